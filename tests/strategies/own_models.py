"""LightningModules as users write them, each with something that an engine may trip over; on 8 x 8 images."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.plan import ParallelPlan


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Blocks(pl.LightningModule):
    """A stem, two blocks, a head. Takes the keys of our own modules, and uses the optimizer alone."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__()
        self.make_optimizer = optimizer

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), Block(32), nn.Linear(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)


class SharedByBlocks(Blocks):
    """One matrix stands in both blocks."""

    def configure_model(self) -> None:
        super().configure_model()
        first, second = self.net[1], self.net[2]
        assert isinstance(first, Block)
        assert isinstance(second, Block)
        second.up.weight = first.up.weight


class FrozenStem(Blocks):
    """No gradient reaches the first block's input."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net[0].requires_grad_(False)


class BlocksFirst(Blocks):
    """Nothing comes before the first block."""

    plan = ParallelPlan(blocks=("0", "1"), head=("2",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(Block(64), Block(64), nn.Linear(64, 10))


class HasStatistics(Blocks):
    """Running statistics, which are each rank's own until somebody shares them."""

    plan = ParallelPlan()

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 10))


class DropsOut(Blocks):
    plan = ParallelPlan()

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))


class ClipsByItself(Blocks):
    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


class HasScalar(Blocks):
    def configure_model(self) -> None:
        super().configure_model()
        self.temperature = nn.Parameter(torch.ones(()))


class StepsTwiceBackward(Blocks):
    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__(net, optimizer, scheduler)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            loss = self.loss(batch)
            self.manual_backward(loss)
        optimizer.step()
        return loss
