"""LightningModules whose optimizers count, and whose buffers are of every format, as a checkpoint has to keep them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.strategies.own_models import Blocks


class Averaging(Optimizer):
    """SGD whose weights are an average (Defazio et al. 2024): what it counts is in its groups, and it has two modes."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        # `pace` is a tensor that all groups share, `seen` a tuple; `weight_sum` comes with the first step.
        super().__init__(params, {"lr": lr, "k": 0, "pace": torch.ones(()), "seen": (0, -1.0), "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            assert group["train_mode"], "call train() first"
            group["k"] += 1
            group["pace"] *= 0.9
            group["weight_sum"] = group.get("weight_sum", 0.0) + group["lr"] ** 2 * group["k"] ** 0.5
            group["seen"] = (group["k"], max(group["seen"][1], group["lr"]))
            share = group["lr"] ** 2 * group["k"] ** 0.5 / group["weight_sum"] if group["weight_sum"] else 0.0
            for one in group["params"]:
                if one.grad is not None:
                    kept = self.state[one]
                    kept.setdefault("z", one.clone())
                    kept["steps"] = kept.get("steps", 0) + 1
                    kept["z"] -= float(group["pace"]) * group["lr"] / kept["steps"] ** 0.1 * one.grad
                    one.lerp_(kept["z"], share)
        return loss


class Moving(Averaging):
    """Validates at weights that it trains beside."""

    def train(self) -> None:
        self.move(2.0, to_train=True)

    def eval(self) -> None:
        self.move(0.5, to_train=False)

    @torch.no_grad()
    def move(self, weight: float, *, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to_train:
                for one in group["params"]:
                    if one in self.state:
                        one.lerp_(self.state[one]["z"], 1 - weight)
            group["train_mode"] = to_train


class Estimating(Optimizer):
    """SGD at a rate that it finds out from all parameters (Mishchenko and Defazio 2024); in its groups, as Prodigy."""

    def __init__(self, params: Iterable[Any], lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "d": 0.01, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        stepped = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        for one in stepped:
            kept = self.state[one]
            if "step" not in kept:
                kept["step"] = 0
                kept["p0"] = one.flatten().clone() if one.any() else torch.zeros(())
        length = sum(float((self.state[one]["p0"] - one.flatten()).norm()) for one in stepped)
        for group in self.param_groups:
            group["k"] += 1
            group["length"] = length
            group["d"] = max(group["d"], group["lr"] * length / group["k"])
            for one in group["params"]:
                if one.grad is not None:
                    self.state[one]["step"] += 1
                    one -= group["lr"] * group["d"] * one.grad
        return loss


class Averages(Blocks):
    """Two groups, which are counted each by itself, and no schedule."""

    def configure_optimizers(self) -> Optimizer:
        matrices = [parameter for parameter in self.parameters() if parameter.dim() == 2]
        others = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        return Averaging([{"params": matrices, "lr": 0.2}, {"params": others}])

    def on_train_start(self) -> None:
        optimizer: Any = self.trainer.optimizers[0]
        getattr(optimizer, "optimizer", optimizer).train()  # DeepSpeed's is around the module's own


class Moves(Averages):
    def configure_optimizers(self) -> Optimizer:
        return Moving(self.parameters(), lr=0.2)

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers().eval()  # type: ignore[union-attr]

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().train()  # type: ignore[union-attr]


class Estimates(Blocks):
    def configure_optimizers(self) -> Optimizer:
        return Estimating(self.parameters())


class HasBuffers(Averages):
    """Buffers of formats that few have; what they hold goes into the loss."""

    FORMATS = ("complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")

    def configure_model(self) -> None:
        super().configure_model()
        for name in self.FORMATS:
            self.register_buffer(name, torch.ones(3).to(getattr(torch, name)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        with torch.no_grad():
            self.get_buffer("complex64").mul_(1 + 0.3j)
            self.complex128 = (self.get_buffer("complex128") * (1 - 0.2j)).conj()
            for name in self.FORMATS[2:]:
                setattr(self, name, (self.get_buffer(name).double() * 1.3 + 1).to(getattr(torch, name)))
        seen = [getattr(self, name).to(torch.complex128).abs().sum() for name in self.FORMATS]
        return loss * (1 + 0.01 * torch.stack(seen).sum().float().log())


class KeepsLists(Blocks):
    """An optimizer that keeps what no checkpoint holds."""

    def configure_optimizers(self) -> Optimizer:
        return Listing(self.parameters(), lr=0.1)


class Listing(torch.optim.SGD):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for one in self.param_groups[0]["params"]:
            self.state[one]["old"] = [*self.state[one].get("old", []), one.detach().clone()]
        return loss


class CountsInVectors(Blocks):
    def configure_optimizers(self) -> Optimizer:
        return Vectors(self.parameters(), lr=0.1)


class Vectors(torch.optim.SGD):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["rates"] = torch.full((3,), group["lr"])
        return super().step(closure)


class HasSparse(Blocks):
    def configure_model(self) -> None:
        super().configure_model()
        self.register_buffer("links", torch.eye(3).to_sparse())


class HasExtra(Blocks):
    """A module whose state_dict has more than parameters and buffers."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net[1].register_state_dict_post_hook(note)


def note(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    state[f"{prefix}note"] = torch.ones(2)
