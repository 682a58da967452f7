"""LightningModules with parts that a grid's stages, splits and shards may get wrong, as users write them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from models.plan import ParallelPlan
from tests.strategies.own_models import MLP, Block, Blocks


class FrozenTie(MLP):
    """A frozen matrix stands in the first block and in the last; the optimizer takes it like any other."""

    def configure_model(self) -> None:
        super().configure_model()
        first, last = self.net[1], self.net[4]
        assert isinstance(first, Block)
        assert isinstance(last, Block)
        last.up.weight = first.up.weight.requires_grad_(False)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


class SharedModule(MLP):
    """The first block and the last have one layer object between them."""

    def configure_model(self) -> None:
        super().configure_model()
        first, last = self.net[1], self.net[4]
        assert isinstance(first, Block)
        assert isinstance(last, Block)
        last.up = first.up


class TiedInTwoWays(MLP):
    """What a tensor axis would split along its rows here and along its columns there."""

    def configure_model(self) -> None:
        super().configure_model()
        first, second = self.net[1], self.net[2]
        assert isinstance(first, Block)
        assert isinstance(second, Block)
        second.down.weight = first.up.weight


class MeanHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1))


class Tokens(Blocks):
    """Takes pixels as tokens of 16 kinds, of which the empty one is padding, in the last rank's half of the rows."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",), tensor={"0": "embedding"})
    padding = 15

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(self.embedding(), Block(32), Block(32), MeanHead(32, 10))

    def embedding(self) -> nn.Module:
        return nn.Embedding(16, 32, padding_idx=self.padding)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(15 - (images.flatten(1) * 4).long().clamp(0, 15)), labels)


class PadsFirst(Tokens):
    """The padding lies in the first rank's half."""

    padding = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net((images.flatten(1) * 4).long().clamp(0, 15)), labels)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 5


class ScalesTokens(Tokens):
    def embedding(self) -> nn.Module:
        return Scaled(16, 32)


class BoundsTokens(Tokens):
    def embedding(self) -> nn.Module:
        return nn.Embedding(16, 32, max_norm=1.0)


class Slope(nn.PReLU):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.25)


class SlopedBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.slope, self.down = nn.Linear(size, size), Slope(), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.slope(self.up(x)))


class Sloped(MLP):
    """Between two split matrices a parameter that is not."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), *(SlopedBlock(32) for _ in range(4)), nn.Linear(32, 10))


class SearchesLine(MLP):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1)


class ClipsByItself(MLP):
    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class ZeroesByItself(MLP):
    def optimizer_zero_grad(self, *args: Any) -> None:
        self.zero_grad(set_to_none=True)


class FrozenFirstHalf(MLP):
    """Of two stages the first one trains nothing; the optimizer takes its parameters all the same."""

    def configure_model(self) -> None:
        super().configure_model()
        for position in range(3):
            self.net[position].requires_grad_(False)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.003)


class GivesTrained(FrozenFirstHalf):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad])


class GivesEmptyGroup(FrozenFirstHalf):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([{"params": [part for part in self.parameters() if part.requires_grad]}])


class SometimesMore(nn.Module):
    """Has a layer for those samples alone whose first feature says so."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(65, 10), nn.Linear(65, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits, chosen = self.always(x), x[:, 0] > 0
        return logits.index_add(0, chosen.nonzero()[:, 0], self.sometimes(x[chosen])) if chosen.any() else logits


class Chooses(Blocks):
    """A layer that, of two ranks, often only one has samples for."""

    plan = ParallelPlan(blocks=("0",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(SometimesMore())

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(torch.cat([(labels[:, None] < 2).float(), images.flatten(1)], 1)), labels)
