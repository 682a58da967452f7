"""Boxes cover what they are said to cover, once."""

import itertools
import math

import numpy as np
import pytest

from strategies.boxes import Box, boxes_of_range


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (1, 5, 1), (4, 1)], ids=str)
def test_boxes_of_a_range_are_its_elements_in_their_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    flat = np.arange(numel)
    for first, end in itertools.combinations_with_replacement(range(numel + 1), 2):
        boxes = boxes_of_range(first, end, shape)
        parts = [flat.reshape(shape)[box.inside(Box.whole(shape))].ravel() for box in boxes]
        assert np.array_equal(np.concatenate([np.empty(0, dtype=int), *parts]), flat[first:end])
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_overlap_is_what_two_boxes_have_in_common() -> None:
    box = Box((1, 2), (4, 6))
    assert box.overlap(Box((3, 0), (9, 3))) == Box((3, 2), (4, 3))
    assert box.overlap(Box((4, 2), (5, 6))) is None
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
    assert Box((2, 3), (3, 5)).inside(box) == (slice(1, 2), slice(1, 3))
    assert (box.shape, box.numel) == ((3, 4), 12)
