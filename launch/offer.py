"""Offers the module the config's optimizer, and notes whether it was ever asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, final


@final
class Offered:
    """Stands for a partial, and notes that it was called; a module may look at `func` and `keywords` as of any other.

    Not a subclass, which Hydra takes from no target.
    """

    was_called: ClassVar[bool] = False  # in this process, which trains one run; copies of a module share it

    def __init__(self, optimizer: partial) -> None:
        self.func, self.args, self.keywords = optimizer.func, optimizer.args, optimizer.keywords

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        Offered.was_called = True
        return self.func(*self.args, *args, **{**self.keywords, **keywords})


def offering(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The model's section in which what refers to the config's optimizer, by `${optimizer}`, notes its calls."""
    if model.get("_recursive_") is False:  # it makes what is in it by itself, from the section
        return dict(model)
    return {key: offering_at(value, optimizer) for key, value in model.items()}


def offering_at(value: Any, optimizer: Mapping[str, Any]) -> Any:
    if value == optimizer and optimizer.get("_partial_"):
        return {"_target_": f"{__name__}.{Offered.__name__}", "optimizer": dict(optimizer)}
    return offering(value, optimizer) if isinstance(value, Mapping) else value


def offers(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> bool:
    """Whether the model's section refers to the config's optimizer as a whole."""
    return offering(model, optimizer) != model
