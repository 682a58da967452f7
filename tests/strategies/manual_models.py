"""LightningModules that optimize manually, as Lightning's documentation shows it; on 8 x 8 images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from tests.strategies.own_models import Blocks

NOISE = 16


class GAN(pl.LightningModule):
    """Two nets, two optimizers, two schedules; each net's gradients are clipped. Its noise is a part of the images."""

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.generator = nn.Sequential(nn.Linear(NOISE, 32), nn.ReLU(), nn.Linear(32, 64))
            self.judge = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def judged(self, images: Tensor, *, real: bool) -> Tensor:
        logits = self.judge(images)
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        images = batch[0].flatten(1)
        of_generator, of_judge = cast(list[Any], self.optimizers())
        self.step(of_generator, lambda: self.judged(self.generator(images[:, :NOISE]), real=True))
        fake = self.generator(images[:, :NOISE]).detach()
        self.step(of_judge, lambda: (self.judged(images, real=True) + self.judged(fake, real=False)) / 2)
        for schedule in cast(list[LRScheduler], self.lr_schedulers()):
            schedule.step()

    def step(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images = batch[0].flatten(1)
        loss = self.judged(self.generator(images[:, :NOISE]), real=True)
        self.log("val/loss", loss, batch_size=len(images), sync_dist=True)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        optimizers = [Adam(self.generator.parameters(), lr=0.01), SGD(self.judge.parameters(), lr=0.5, momentum=0.9)]
        return list(optimizers), [StepLR(optimizer, 2, gamma=0.5) for optimizer in optimizers]


class UntoggledGAN(GAN):
    """The generator's loss goes backward through the judge's parameters, too; it returns and logs what it has."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        images = batch[0].flatten(1)
        of_generator, of_judge = cast(list[Any], self.optimizers())
        fake = self.generator(images[:, :NOISE])
        for_generator = self.judged(fake, real=True)
        of_generator.zero_grad()
        self.manual_backward(for_generator)
        of_generator.step()
        for_judge = self.judged(images, real=True) + self.judged(fake.detach(), real=False)
        of_judge.zero_grad()
        self.manual_backward(for_judge)
        of_judge.step()
        self.log_dict({"train/generator": for_generator, "train/judge": for_judge}, sync_dist=True)
        return {"loss": for_generator.detach() + for_judge.detach(), "fake": fake.detach()}


class Accumulates(Blocks):
    """One optimizer, stepped every second batch, by a closure."""

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__(net, optimizer, scheduler)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class NoisyGAN(GAN):
    """Its generator is given noise."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)


class NanGAN(GAN):
    """The second step's loss of the judge is no number, on the last rank."""

    def step(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
        is_due = self.global_step == 3 and self.global_rank == self.trainer.world_size - 1
        super().step(optimizer, lambda: loss() * (float("nan") if is_due else 1.0))
