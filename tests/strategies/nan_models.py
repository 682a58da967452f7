"""Language models whose loss or gradient is no number on one rank, in one optimizer step."""

from typing import Any

import torch
from torch import Tensor

from models.language import LanguageModel

STEP = 1  # steps that lie behind it


class NanOnce(LanguageModel):
    """The last rank's loss is NaN."""

    factor = float("nan")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor if self.is_due else loss

    @property
    def is_due(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.global_step == STEP and self.global_rank == trainer.world_size - 1


class InfiniteOnce(NanOnce):
    """The last rank's loss is infinite, and its gradients are numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = LanguageModel.training_step(self, batch, batch_idx)
        return loss + float("inf") if self.is_due else loss


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


class NanGradientOnce(NanOnce):
    """The last rank's loss is a number, and its gradients are not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = LanguageModel.training_step(self, batch, batch_idx)
        return _NanGradient.apply(loss) if self.is_due else loss
