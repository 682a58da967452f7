"""Boxes: the parts of tensors that ranks hold, whatever the strategy. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A part of a tensor: from `start` to below `stop` in each dim. A scalar's one box has no dims."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What two boxes have in common; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))


def boxes_of_range(first: int, end: int, shape: Sequence[int]) -> list[Box]:
    """The boxes that elements `first` to below `end` of a flattened (row-major) tensor make up, in that order.

    At most 2 * dims - 1 of them: an end of a row, whole rows, the start of a row, and so on inside of these.
    """
    if first >= end:
        return []
    if len(shape) < 2:
        return [Box((first,) * len(shape), (end,) * len(shape))]
    row = math.prod(shape[1:])
    first_row, last_row = -(-first // row), end // row  # whole rows are those from the first to below the last
    if first_row > last_row:  # it begins and ends inside of one row
        return in_row(last_row, boxes_of_range(first - last_row * row, end - last_row * row, shape[1:]))
    head = boxes_of_range(first - (first_row - 1) * row, row, shape[1:]) if first % row else []
    tail = boxes_of_range(0, end - last_row * row, shape[1:])
    rows = [Box((first_row, *(0,) * (len(shape) - 1)), (last_row, *shape[1:]))] if first_row < last_row else []
    return [*in_row(first_row - 1, head), *rows, *in_row(last_row, tail)]


def in_row(row: int, boxes: Sequence[Box]) -> list[Box]:
    return [Box((row, *box.start), (row + 1, *box.stop)) for box in boxes]
