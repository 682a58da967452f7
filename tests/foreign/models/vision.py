"""timm's and torchvision's models, and a recurrent net, each in an ordinary LightningModule, on digits of 8 x 8."""

from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from models.plan import ParallelPlan


class Images(pl.LightningModule):
    """A net of ten classes on images that are made four times as large."""

    plan = ParallelPlan()

    def __init__(self, name: str, lr: float, **options: Any) -> None:
        super().__init__()
        self.lr = lr
        self.net = self.make_net(name, options)

    def make_net(self, name: str, options: dict[str, Any]) -> Any:
        return timm.create_model(name, in_chans=1, num_classes=10, **options)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(interpolate(images, scale_factor=4)), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Timm(Images):
    plan = ParallelPlan(blocks=("stages.*.blocks.*",))


class TimmResNet(Images):
    plan = ParallelPlan(blocks=("layer[1-4].*",))


class Torchvision(TimmResNet):
    def make_net(self, name: str, options: dict[str, Any]) -> Any:
        return torchvision.models.get_model(name, num_classes=10, **options)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return super().loss([images.expand(-1, 3, -1, -1), labels])


class Recurrent(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, size, num_layers=2, batch_first=True)
        self.classes = nn.Linear(size, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.rows(images.squeeze(1))
        return self.classes(states[:, -1])


class Lstm(Images):
    """torch's LSTM, an image's rows one after the other."""

    def make_net(self, name: str, options: dict[str, Any]) -> Any:
        return Recurrent(**options)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)
