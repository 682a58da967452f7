"""The order that a sampler of the user's gives, as one endless stream of samples."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any, final

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from datamodules.draws import Generators
from datamodules.order import Indices, Order, Stream
from datamodules.refused import RefusedError


@final
class Drawn(Stream):
    """Epochs as a sampler gives them, one after the other.

    It draws from generators of its own, which start at the run's seed. What it gives at a position may depend on all
    that it gave before, so it is asked from the start on, also by a run that goes on in the middle. Positions are to
    be asked for in rising order.
    """

    def __init__(self, sampler: Iterable[Any], name: str, *, global_batch_size: int, seed: int) -> None:
        self.global_batch_size = global_batch_size
        self._sampler, self._name = sampler, name
        self._generators = Generators(seed, "sampler")
        self._ends: list[int] = []  # the positions at which epochs have ended
        self._window: deque[Any] = deque()
        self._first = 0  # position of the first sample in the window
        self._samples = self._epochs()

    @property
    def described(self) -> str:
        return f"by {self._name}"

    def indices(self, first: int, count: int) -> Indices:
        assert first >= self._first, "a position that has been left behind"
        self._take(first, keep=False)
        self._take(first + count)
        return listed(list(islice(self._window, count)))

    def epochs_before(self, position: int) -> int:
        self._take(position + 1)  # only who is asked for more says that the epoch is over
        return bisect_right(self._ends, position)

    def _take(self, position: int, *, keep: bool = True) -> None:
        """Have the window reach up to `position`; without `keep` it starts there, too."""
        missing = position - self._first - len(self._window)
        if not keep:
            for _ in range(min(len(self._window), position - self._first)):
                self._window.popleft()
            self._first = position
        if missing > 0:
            with self._generators.inside():
                taken = islice(self._samples, missing)
                self._window.extend(taken) if keep else deque(taken, maxlen=0)

    def _epochs(self) -> Iterator[Any]:
        position = 0
        for epoch in count():
            set_epoch = getattr(self._sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            began = position
            for index in self._sampler:
                position += 1
                yield index
            if position == began:
                raise RefusedError(f"data.module: {self._name} gives no sample in epoch {epoch}; give it some.")
            self._ends.append(position)


def listed(indices: list[Any]) -> Indices:
    """What a sampler gives: whole numbers most often, but a data set may have other keys."""
    held = np.empty(len(indices), dtype=object)
    held[:] = indices
    return held


@final
class Joined:
    """The samples of batches, one by one; ValueError where one has not the size that all are to have."""

    def __init__(self, batches: Any, size: int) -> None:
        self._batches, self._size = batches, size

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if len(batch) != self._size:
                raise RefusedError(
                    f"data.module: {type(self._batches).__name__} gives a batch of {len(batch)} samples where others "
                    f"have {self._size}; have it leave out what does not fill one, or give a sampler in its place."
                )
            yield from batch


def stream_of(loader: DataLoader[Any], *, batch_size: int, global_batch_size: int, seed: int) -> Stream:
    """The order in which a loader of `batch_size` would give the samples of its map-style data set.

    In order and shuffled are Concord's own to give, which can start anywhere; so are those of a `DistributedSampler`,
    whose shares are joined again.
    """
    batches: Any = loader.batch_sampler
    sizes: dict[str, Any] = {"global_batch_size": global_batch_size, "seed": seed}
    if type(batches) is not BatchSampler:
        return Drawn(Joined(batches, batch_size), type(batches).__name__, **sizes)
    sampler: Any = batches.sampler
    kind = type(sampler)
    if kind is SequentialSampler:
        return Order(num_samples=some(len(sampler)), shuffles=False, **sizes)
    if kind is DistributedSampler:
        return Order(num_samples=some(len(sampler.dataset)), shuffles=sampler.shuffle, **sizes)
    if kind is RandomSampler and is_plain(sampler):
        return Order(num_samples=some(len(sampler)), **sizes)
    return Drawn(sampler, kind.__name__, **sizes)


def is_plain(sampler: RandomSampler) -> bool:
    """Whether it shuffles all samples, by no generator of the user's."""
    whole = sampler.num_samples == len(sampler.data_source)
    return whole and not sampler.replacement and sampler.generator is None


def some(num_samples: int) -> int:
    if num_samples == 0:
        raise RefusedError("data.module: the training set has no samples; give it some.")
    return num_samples
