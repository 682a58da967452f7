"""LightningModules whose steps do what a pipeline has to carry out in parts: their logs, draws, shapes and changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from models.plan import ParallelPlan
from tests.strategies.own_models import MLP, Block


class LogsExtremes(MLP):
    """Logs sums and extremes, and computes metrics, never logged as objects, when an epoch is over."""

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__(net, optimizer, scheduler)
        kinds = {kind: MulticlassAccuracy(10, average=kind) for kind in ("micro", "macro")}
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.both = MetricCollection(dict(kinds))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images.flatten(1))
        self.log("train/sum", logits.sum(), reduce_fx="sum")
        self.log("train/max", logits.max(), reduce_fx=torch.max)
        self.log("train/min", logits.min(), reduce_fx="min")
        self.accuracy.update(logits, labels)
        return functional.cross_entropy(logits, labels)

    def on_train_epoch_end(self) -> None:
        self.log("train/accuracy", self.accuracy.compute(), sync_dist=True)
        self.accuracy.reset()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images.flatten(1))
        self.both.update(logits, labels)
        self.log("val/loss", functional.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if all(metric.update_called for metric in self.both.values()):
            self.log_dict({f"val/{kind}": value for kind, value in self.both.compute().items()}, sync_dist=True)
        self.both.reset()


class TakesMean(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1))


class Trims(MLP):
    """Rows of an image are its sequence, of which each batch has another length."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(8, 32), *(Block(32) for _ in range(4)), TakesMean(32, 10))

    def loss(self, batch: list[Tensor], length: int = 8) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.net(images.reshape(len(labels), 8, 8)[:, :length]), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch, 8 - batch_idx % 3)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch, 8 - 5 * batch_idx), batch_size=len(batch[1]), sync_dist=True)


class Decodes(nn.Linear):
    """Gives back what position stood out in the net's input; the layer itself takes part by nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :32]) * 0 + x[:, 32:].argmax(1, keepdim=True)


class NoisyIdentity(MLP):
    """Its validation draws a label for each sample, and its net lets that pass."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(Keeps(64), Keeps(64), Keeps(64), Decodes(32, 10))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        drawn = torch.randint(0, 10, (len(batch[1]),))
        images = 50.0 * functional.one_hot(drawn, 64)
        output = self.net(images)
        self.log("val/loss", output.mean(), batch_size=len(drawn), sync_dist=True)
        if self._trainer is not None:
            apart = (output[:, 0].long() - drawn).abs().max().float()
            self.log("val/drawn_apart", apart, reduce_fx="max", sync_dist=True)
            self.log(f"val/drawn_{batch_idx}", drawn.float().mean(), sync_dist=True)


class Keeps(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        half = torch.zeros(len(x), 32, device=x.device) if x.shape[1] == 64 and x[:, 32:].sum() == 0 else None
        moved = x if half is None else torch.cat([half, x[:, :32]], 1)
        return moved + 0 * self.scale(x[:, :1])


class ChangesBatch(MLP):
    """Changes its batch in place."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        images.mul_(2.0)
        labels.add_(1).remainder_(10)
        return functional.cross_entropy(self.net(images.flatten(1)), labels)


class ChangesInput(MLP):
    """Each of its blocks changes what it is given."""

    plan = ParallelPlan(stem=("0",), blocks=("[1-6]",), head=("7",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            layers = [layer for _ in range(3) for layer in (nn.ReLU(inplace=True), nn.Linear(32, 32))]
            self.net = nn.Sequential(nn.Linear(64, 32), *layers, nn.Linear(32, 10))


class First(nn.Linear):
    """Its second output is `extra` of the first."""

    extra = staticmethod(lambda x: x.square().mean())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x = super().forward(x)
        return x, self.extra(x)


class Middle(Block):
    def forward(self, both: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, *rest = both
        return super().forward(x), *rest


class Last(nn.Linear):
    def forward(self, both: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(both[0]), both[1]


class PassesLoss(MLP):
    """Beside its activations goes an auxiliary loss."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))
    stem: type[First] = First

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(self.stem(64, 32), Middle(32), Middle(32), Last(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        logits, extra = self.net(batch[0].flatten(1))
        return functional.cross_entropy(logits, batch[1]) + 0.1 * extra.real.mean()


class FirstTable(First):
    extra = staticmethod(lambda x: torch.linspace(0, 1, 33).to(x).reshape(11, 3))


class FirstComplex(First):
    extra = staticmethod(lambda x: torch.view_as_complex(x.reshape(len(x), 16, 2)) * torch.tensor(1j).to(x.device))


class FirstOfColumns(First):
    extra = staticmethod(lambda x: x.mean(0))


class PassesTable(PassesLoss):
    """Beside its activations goes a table that is the same for all samples."""

    stem = FirstTable


class PassesComplex(PassesLoss):
    """Beside its activations go complex numbers, which take a gradient."""

    stem = FirstComplex


class PassesColumns(PassesLoss):
    """Beside its activations go means over each micro-batch."""

    stem = FirstOfColumns


class PenalizesWeights(MLP):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) + 0.01 * sum(parameter.square().sum() for parameter in self.parameters())
