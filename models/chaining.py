"""Whether a net's forward is what its plan says: the chain of its units, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Calls:
    """Which units were called while a net was, with what, and what came of it."""

    names: list[str] = field(default_factory=list)
    taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    net_calls: int = 0
    net_taken: tuple[Any, ...] = ()
    net_given: Any = None

    def gap(self, units: list[str]) -> str | None:
        """Where the calls are not those of a chain of `units`, in words; None where they are.

        What one unit gives must be the very object that the next one takes: so nothing was done to it in between.
        """
        if not self.names:
            return None  # the net was not called, or it has no plan
        if self.net_calls > 1:
            return f"a step calls the net {self.net_calls} times"
        for position, unit in enumerate(units):
            if position >= len(self.names) or self.names[position] != unit:
                called = self.names[position] if position < len(self.names) else "nothing"
                return f"where the plan has {unit}, the net's forward calls {called}"
        if len(self.names) > len(units):
            return f"after the plan's last module the net's forward calls {self.names[len(units)]} again"
        return self.gap_between(units)

    def gap_between(self, units: list[str]) -> str | None:
        first, _ = self.taken[0]
        if len(first) != len(self.net_taken) or any(a is not b for a, b in zip(first, self.net_taken, strict=True)):
            return f"{units[0]} is not called with what the net is called with"
        for before, after, given, (taken, _) in zip(units, units[1:], self.given, self.taken[1:], strict=False):
            if len(taken) != 1 or taken[0] is not given:
                return f"{after} is not called with just what {before} gives"
        for unit, (_, named) in zip(units[:-1], self.taken, strict=False):
            if named:
                return f"{unit} is called with {', '.join(named)}, and only the last module takes keyword arguments"
        if self.given[-1] is not self.net_given:
            return f"the net does not give what {units[-1]} gives"
        return None


@contextmanager
def watch_calls(net: nn.Module, units: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Yield Calls that fill while the context is entered."""
    calls = Calls()

    def called(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.names.append(name)
        calls.taken.append((args, kwargs))
        calls.given.append(output)

    def net_called(args: tuple[Any, ...], output: Any) -> None:
        calls.net_calls += 1
        calls.net_taken, calls.net_given = args, output

    handles = [
        unit.register_forward_hook(
            lambda _, args, kwargs, output, name=name: called(name, args, kwargs, output), with_kwargs=True
        )
        for name, unit in units.items()
    ]
    if units:
        handles.append(net.register_forward_hook(lambda _, args, output: net_called(args, output)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
