"""LightningModules as users write them, each with something that an engine may trip over; on 8 x 8 images."""

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

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


class HasScale(Blocks):
    """A parameter beside the blocks that a plan lists."""

    def configure_model(self) -> None:
        super().configure_model()
        self.scale = nn.Parameter(torch.ones(4))


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


class ClosesTwice(Blocks):
    """Goes forward and backward twice before a step, as sharpness-aware minimisation does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, as in ResNet (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).relu()


class Classifier(nn.Module):
    """The mean over all positions, then two layers."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.logits = nn.Linear(channels, 16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.hidden(x.mean((2, 3))).relu())


class ResNet(Blocks):
    """A chain with BatchNorm; tensor ranks share the head's two layers."""

    plan = ParallelPlan(
        stem=("stem",),
        blocks=("blocks.*",),
        head=("head",),
        tensor={"head.hidden": "colwise", "head.logits": "rowwise"},
    )

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential()
            self.net.add_module("stem", nn.Conv2d(1, 8, 3, padding=1))
            self.net.add_module("blocks", nn.Sequential(*(Residual(8) for _ in range(4))))
            self.net.add_module("head", Classifier(8, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)


class MLP(Blocks):
    """A plain chain; tensor ranks share each block's two layers."""

    plan = ParallelPlan(
        stem=("0",),
        blocks=("[1-4]",),
        head=("5",),
        tensor={"[1-4].up": "colwise", "[1-4].down": "rowwise"},
    )

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), *(Block(32) for _ in range(4)), nn.Linear(32, 10))


class Logs(MLP):
    """Logs numbers and a metric object in its steps."""

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object) -> None:
        super().__init__(net, optimizer, scheduler)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.val_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        images, labels = batch
        logits = self.net(images.flatten(1))
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("train/size", logits.square().mean(), batch_size=len(labels), sync_dist=True)
        if self.trainer.global_step % 2:
            self.log_dict({"train/odd": loss}, batch_size=len(labels), sync_dist=True)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images.flatten(1))
        self.val_accuracy(logits, labels)
        self.log("val/accuracy", self.val_accuracy)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("val/loss", loss, batch_size=len(labels), sync_dist=True)


class CallsTwice(MLP):
    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images.flatten(1)) + self.net(images.flatten(1)), labels)


class GivesDict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


class TakesDict(nn.Module):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["x"]


class PassesDict(MLP):
    """Between its blocks goes what no rank can send."""

    plan = ParallelPlan(stem=("0", "1"), blocks=("2", "3", "4"), head=("5",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            first, last = nn.Sequential(Block(32), GivesDict()), nn.Sequential(TakesDict(), Block(32))
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), first, last, Block(32), nn.Linear(32, 10))


class PassesTuple(MLP):
    """Between its blocks goes a tuple, of which one part takes no gradient."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(GivesTwo(), TakesTwo(), TakesTwo(), OfTwo())


class GivesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x.argmax(-1, keepdim=True)


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(32)

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, index = both
        return self.block(x) + index / 64, index


class OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 10)

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(both[0])


class Mixes(MLP):
    """Draws at random before it calls its net, and again needs what it drew after that, as mixup does."""

    plan = ParallelPlan(stem=("0",), blocks=("1",), head=("2",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(PassesShare(64, 32), PassesShare(32, 32), PassesShare(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        share = torch.rand(len(labels), 1) + random.random() + np.random.rand()
        logits, passed = self.net((images.flatten(1), share))
        self.log("train/drawn_apart", (passed - share).abs().max(), batch_size=len(labels))
        return nn.functional.cross_entropy(logits * share, labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits, _ = self.net((images.flatten(1), torch.ones(len(labels), 1)))
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("val/loss", loss, batch_size=len(labels), sync_dist=True)


class PassesShare(nn.Module):
    def __init__(self, size: int, out_size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, out_size)

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, share = both
        return self.layer(x), share


class LeavesOut(MLP):
    """Its plan forgets a module that has no parameters."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "3"), head=("4",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), nn.Tanh(), Block(32), nn.Linear(32, 10))


class DoesMore(MLP):
    """Its net does more than its plan says."""

    plan = ParallelPlan(stem=("first",), blocks=("second",), head=("third",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = ReluBetween()  # type: ignore[assignment]


class ReluBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 32), Block(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).relu())


class RunsABlockAgain(MLP):
    """One block stands in four places."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            block = Block(32)
            self.net = nn.Sequential(nn.Linear(64, 32), block, block, block, block, nn.Linear(32, 10))

    plan = ParallelPlan(stem=("0",), blocks=("1",), head=("5",))


class NoLoss(MLP):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        return loss if self._trainer is None else None  # measured, it has one


class StepsByRows(MLP):
    """Its optimizer keeps means of a matrix's rows and columns, and looks at the size of each parameter."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=0.01)


class StepsMatrices(MLP):
    """Its optimizer looks at a whole matrix at once."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Muon([parameter for parameter in self.parameters() if parameter.dim() == 2])
