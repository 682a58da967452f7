"""Where a net's forward is not the chain that its plan lists, it is said in words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.chaining import watch_calls


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), Scaled()
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


FORWARDS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "chain": (lambda net, x: net.c(net.b(net.a(x))), None),
    "keyword for the last": (lambda net, x: net.c(net.b(net.a(x)), scale=2.0), None),
    "something in between": (lambda net, x: net.c(net.b(net.a(x)).relu()), "c is not called with just what b gives"),
    "a skip": (lambda net, x: net.c(net.b(net.a(x)) + x), "c is not called with just what b gives"),
    "another order": (lambda net, x: net.c(net.a(net.b(x))), "where the plan has a, the net's forward calls b"),
    "one left out": (lambda net, x: net.b(net.a(x)), "where the plan has c, the net's forward calls nothing"),
    "one twice": (lambda net, x: net.c(net.b(net.b(net.a(x)))), "where the plan has c, the net's forward calls b"),
    "something before": (lambda net, x: net.c(net.b(net.a(x * 2))), "a is not called with what the net is called with"),
    "something after": (lambda net, x: net.c(net.b(net.a(x))) * 2, "the net does not give what c gives"),
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_gap_is_named(kind: str) -> None:
    forward, expected = FORWARDS[kind]
    net = Net(forward)
    with watch_calls(net, {"a": net.a, "b": net.b, "c": net.c}) as calls:
        net(torch.ones(1, 2))
    assert calls.gap(["a", "b", "c"]) == expected
