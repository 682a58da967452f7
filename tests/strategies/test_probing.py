"""How much an optimizer looks at is found by trying it, and is what its authors say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from strategies.engines import probing
from strategies.engines.probing import scope_of

CPU = torch.device("cpu")


class Own(Optimizer):
    """An optimizer of a user's own: what is added to each parameter is `rule` of its gradient and its state."""

    def __init__(self, params: Any, rule: Callable[[Any, dict[str, Any], list[Any]], torch.Tensor]) -> None:
        super().__init__(params, {"lr": 1e-7})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for one in group["params"]:
                one.add_(self.rule(one, self.state[one], group["params"]), alpha=-group["lr"])


def lion(one: Any, state: dict[str, Any], _: list[Any]) -> torch.Tensor:
    mean = state.setdefault("mean", torch.zeros_like(one))
    step = (0.9 * mean + 0.1 * one.grad).sign()
    mean.lerp_(one.grad, 0.01)
    return step


def lamb(one: Any, _: dict[str, Any], __: list[Any]) -> torch.Tensor:
    return one.grad * (one.norm() / one.grad.norm())


def by_row(one: Any, _: dict[str, Any], __: list[Any]) -> torch.Tensor:
    return one.grad / one.grad.square().mean(-1, keepdim=True).sqrt()


def by_all(one: Any, _: dict[str, Any], others: list[Any]) -> torch.Tensor:
    return one.grad / torch.stack([other.grad.norm() for other in others]).norm()


@pytest.mark.parametrize(
    ("rule", "scope"), [(lion, "element"), (lamb, "parameter"), (by_row, "parameter"), (by_all, "all")]
)
def test_an_optimizer_of_ones_own_is_known_by_what_it_does(rule: Any, scope: str) -> None:
    net = nn.Linear(4, 4)
    before = [one.detach().clone() for one in net.parameters()]
    optimizer = Own(net.parameters(), rule)
    assert scope_of(optimizer, [[2, 1]], CPU) == scope
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), before, strict=True))
    assert not optimizer.state


TORCHS = {
    "Adafactor": "parameter",
    "Muon": "parameter",
    "LBFGS": "all",
    "Adagrad": "element",
    **dict.fromkeys(sorted(probing.ELEMENTWISE["torch.optim"]), "element"),
}


@pytest.mark.parametrize(("name", "scope"), TORCHS.items())
def test_torchs_optimizers_are_what_they_are_listed_as(name: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "ELEMENTWISE", {})
    parameter = nn.Parameter(torch.randn(4, 4))
    assert scope_of(getattr(torch.optim, name)([parameter], lr=1e-3), [[2]], CPU) == scope
