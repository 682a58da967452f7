"""LightningModules whose steps use what only a Trainer, or real numbers, give."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn

from tests.strategies.own_models import Block, Blocks


class UsesLogger(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        logger: Any = self.logger
        logger.log_metrics({"own/loss": loss.item()}, step=self.trainer.global_step)
        logger.experiment.log_metrics({"own/rank": float(self.trainer.global_rank)}, step=self.trainer.global_step)
        return loss


class UsesTrainer(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (1.0 if self.trainer.global_step < 100 else 0.5)


class UsesNumbers(Blocks):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * float(batch[0].cpu().numpy().max() > -1.0)


class LateLayer(Blocks):
    """A layer that no sample reaches before the third step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.late = nn.Linear(64, 64)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.trainer.global_step >= 2:
            images = self.late(images.flatten(1))
        return self.loss([images, labels])


class EagerAndNoisy(Blocks):
    """Built where it draws its weights, and draws in every step: by torch, numpy and Python."""

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(64, 32), Block(32), Block(32), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + torch.rand(()) + float(np.random.rand()) + random.random())


class BringsCheckpoint(Blocks):
    def configure_callbacks(self) -> Any:
        return ModelCheckpoint()


class BringsMonitor(Blocks):
    def configure_callbacks(self) -> Any:
        return [LearningRateMonitor(logging_interval="step")]
