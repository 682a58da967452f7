"""What an optimizer keeps in its param_groups beside parameters and settings: counts, sums, a rate that it estimates.

Schedule-free optimizers count their steps there (Defazio et al. 2024), Prodigy has its distance there (Mishchenko and
Defazio 2024). What it is called nobody says; it is what is no longer as `configure_optimizers` made it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

Settings = dict[str, Any]

TENSOR, TUPLE = "tensor of", "tuple of"  # keys of what JSON has no word for


def settings_of(optimizer: Optimizer) -> list[Settings]:
    """By group, copies of all values but the parameters, to be compared with what becomes of them."""
    return [{key: copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def moved(optimizer: Optimizer, start: Sequence[Settings]) -> list[Settings]:
    """By group, in JSON, the values that are no longer as at the start; ValueError for one that cannot be kept."""
    result: list[Settings] = []
    for group, before in zip(optimizer.param_groups, start, strict=True):
        changed = {
            key: value
            for key, value in group.items()
            if key != "params" and not (key in before and same(value, before[key]))
        }
        for key, value in changed.items():
            if not is_kept(value):
                raise ValueError(
                    f"{type(optimizer).__name__} changes {type(value).__name__} {key} in its param_groups, and of such "
                    f"only numbers, text, and lists of them are saved; keep it in the optimizer's state of a parameter"
                )
        result.append({key: encoded(value) for key, value in changed.items()})
    return result


def put_back(optimizer: Optimizer, kept: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups the values that `moved` has found in those of the run that goes on.

    A rank may have fewer groups than the one that spoke for all; then all must have been moved alike.
    """
    groups = optimizer.param_groups
    if kept and len(kept) != len(groups):
        if any(one != kept[0] for one in kept):
            raise ValueError(
                f"resume: {type(optimizer).__name__} counted in the {len(kept)} groups of the checkpoint's optimizer "
                f"each by itself, and a rank here has {len(groups)}; resume under the strategy that wrote it."
            )
        kept = [kept[0]] * len(groups)
    for group, values in zip(groups, kept, strict=False):
        for key, value in values.items():
            group[key] = decoded(value, group.get(key))


class Moment:
    """What a group of an optimizer is at one moment, to which it can be put back: a tensor stays the same object."""

    def __init__(self, group: Settings) -> None:
        self.group, self.values = group, dict(group)
        self.copies = {key: copied(value) for key, value in group.items() if key != "params"}

    def put_back(self, *, but: frozenset[str] = frozenset()) -> None:
        """Put all values back, and take away what came since, but of the keys `but`."""
        for key in self.group.keys() - self.values.keys() - but:
            del self.group[key]
        for key in self.values.keys() - but:
            value = self.values[key]
            if key in self.copies and not same(value, self.copies[key]):
                if isinstance(value, Tensor):
                    value.detach().copy_(self.copies[key])
                else:
                    value = copied(self.copies[key])
            self.group[key] = value


def counting_once(
    step_part: Callable[[int], Any], optimizer: Optimizer, group_of: Mapping[int, int]
) -> Callable[[int], Any]:
    """A step of a first, second, ... part of the parameters, all of which an optimizer counts as one step.

    Each part is stepped as if it were the only one; a group then is what its own parts' steps have made of it.
    """
    start: list[Moment] = []
    after: dict[int, Moment] = {}
    but = frozenset({"params"})

    def step(part: int) -> Any:
        if part == 0:
            start[:] = map(Moment, optimizer.param_groups)
            after.clear()
        for moment in start if part else ():
            moment.put_back(but=but)
        result = step_part(part)
        after[group_of[part]] = Moment(optimizer.param_groups[group_of[part]])
        for moment in after.values():
            moment.put_back(but=but)
        return result

    return step


def copied(value: Any) -> Any:
    match value:
        case Tensor():
            return value.detach().clone()
        case list() | tuple():
            return type(value)(map(copied, value)) if type(value) in (list, tuple) else value
        case dict():
            return {key: copied(item) for key, item in value.items()}
    # What only equals itself is told apart by what it is.
    return value if type(value).__eq__ is object.__eq__ else copy.deepcopy(value)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
        return both and torch.equal(one.detach().cpu().nan_to_num(), other.detach().cpu().nan_to_num())
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other) or (one != one and other != other)  # no number equals itself


def is_kept(value: Any) -> bool:
    match value:
        case Tensor():
            return value.dim() == 0 and not value.dtype.is_complex
        case list() | tuple():
            return all(map(is_kept, value))
        case dict():
            return all(isinstance(key, str) and is_kept(item) for key, item in value.items())
    return isinstance(value, int | float | str | np.number | np.bool_ | None)


def encoded(value: Any) -> Any:
    match value:
        case Tensor():
            return {TENSOR: str(value.dtype).removeprefix("torch."), "value": value.item()}
        case tuple():
            return {TUPLE: list(map(encoded, value))}
        case list():
            return list(map(encoded, value))
        case dict():
            return {key: encoded(item) for key, item in value.items()}
        case np.generic():
            return value.item()
    return value


def decoded(value: Any, here: Any = None) -> Any:
    """A value as `encoded` was given it; `here` is what stands in its place: a tensor stays where it is."""
    match value:
        case {"tensor of": str(name), "value": number}:
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"resume: {name[:100]!r} is no format of a number.")
            if isinstance(here, Tensor) and here.dtype == dtype and here.dim() == 0:
                return here.detach().fill_(number)
            return torch.tensor(number, dtype=dtype, device=here.device if isinstance(here, Tensor) else None)
        case {"tuple of": list(items)}:
            return tuple(map(decoded, items))
        case list():
            return list(map(decoded, value))
        case dict():
            return {key: decoded(item) for key, item in value.items()}
    return type(here)(value) if isinstance(here, np.generic) else value
