"""What can only be read from its start to its end, read again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.refused import RefusedError


class Endless(IterableDataset[Any]):
    """The samples of an iterable data set, pass after pass: a batch goes on across the end of one."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        while True:
            is_empty = True
            for sample in self.dataset:
                is_empty = False
                yield sample
            if is_empty and get_worker_info() is not None:
                return  # the others may have some
            check_some(is_empty, self.dataset)


class Again:
    """The batches of what makes them by itself, pass after pass; ValueError where one has another size."""

    def __init__(self, batches: Iterable[Any], batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Any]:
        while True:
            is_empty = True
            for batch in self.batches:
                is_empty = False
                self.check(batch)
                yield batch
            check_some(is_empty, self.batches)

    def check(self, batch: Any) -> None:
        rows = next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
        if rows not in (None, self.batch_size):
            raise RefusedError(
                f"data.micro_batch_size={self.batch_size}, but the training loader gives a batch of {rows} samples; "
                f"set data.micro_batch_size={rows}, or have it give {self.batch_size} at a time, its last batch too."
            )


def check_some(is_empty: bool, source: object) -> None:
    if is_empty:
        raise RefusedError(f"data.module: {type(source).__name__} gives nothing to train on; give it some samples.")
