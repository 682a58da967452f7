"""A LightningDataModule as its authors wrote it for Lightning, and a small model for it."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from models.plan import ParallelPlan


class Numbers(pl.LightningDataModule):
    """Ten classes of 64 numbers. `order` is one of shuffled, in_order, weighted and iterable."""

    def __init__(self, batch_size: int = 4, num_samples: int = 44, order: str = "shuffled") -> None:
        super().__init__()
        self.batch_size, self.num_samples, self.order = batch_size, num_samples, order

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.num_samples + 19, 64, generator=generator)
        y = x[:, :10].argmax(1)
        self.train_set = TensorDataset(x[: self.num_samples], y[: self.num_samples])
        self.val_set = TensorDataset(x[self.num_samples :], y[self.num_samples :])

    def train_dataloader(self) -> DataLoader[Any]:
        if self.order == "iterable":
            return DataLoader(Passed(self.train_set), batch_size=self.batch_size)
        weights = WeightedRandomSampler([1.0 + i % 3 for i in range(self.num_samples)], self.num_samples)
        sampler = weights if self.order == "weighted" else None
        return DataLoader(self.train_set, self.batch_size, shuffle=self.order == "shuffled", sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=self.batch_size)


class Remembers(Numbers):
    """It would have something of its own in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 1}


class Passed(IterableDataset[Any]):
    """A data set that can only be read from its start to its end."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self.samples)):
            yield self.samples[number]


class Small(pl.LightningModule):
    """A chain of linear layers that says when an epoch ends."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__()
        self.make_optimizer = optimizer

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        numbers, labels = batch
        return nn.functional.cross_entropy(self.net(numbers), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        print(f"epoch {self.current_epoch} ends at step {self.global_step}", flush=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class PerEpoch(Small):
    """Its rate is halved after each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}
