"""LightningModules by what their steps return, and what is done with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.strategies.own_models import Blocks


class ReturnsMore(Blocks):
    """Its steps return a dict, which its hooks look at."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        images, labels = batch
        logits = self.net(images.flatten(1))
        rows = {"logits": logits, "nested": [labels, ("word", 3)]}
        return {"loss": cross_entropy(logits, labels), "mean": logits.detach().mean(), **rows}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        labels, (word, number) = outputs["nested"]
        assert (word, number) == ("word", 3)
        assert not outputs["logits"].requires_grad or self.trainer.world_size == 1 or outputs["logits"].grad_fn
        self.log("train/again", cross_entropy(outputs["logits"].detach(), labels), sync_dist=True)
        self.log("train/mean", outputs["mean"], sync_dist=True)
        self.log("train/loss_again", outputs["loss"], sync_dist=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        super().validation_step(batch, batch_idx)
        return {"size": len(batch[1]), "labels": batch[1]} if batch_idx else None

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.trainer.sanity_checking:
            return
        assert (outputs is None) == (batch_idx == 0)
        if outputs is not None:
            assert len(outputs["labels"]) == outputs["size"]


class ReturnsNone(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if batch_idx == 1 else self.loss(batch)


class ReturnsNoLoss(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"objective": self.loss(batch)}


class ReturnsNumber(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return float(self.loss(batch).detach())


class ReturnsList(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return [self.loss(batch)]


class ReturnsRows(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        images, labels = batch
        return cross_entropy(self.net(images.flatten(1)), labels, reduction="none")


class ReturnsInteger(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": self.loss(batch).long()}


class ReturnsComplex(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.loss(batch) * torch.tensor(1j)


class ReturnsDetached(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.loss(batch).detach()
