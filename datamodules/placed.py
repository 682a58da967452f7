"""Batches of a map-style data set of the user's, whose random draws go by the place of a sample in the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, Sampler, Subset, get_worker_info

from datamodules.draws import draws_apart, seed_by
from datamodules.loading import TrainSampler, begin_worker
from datamodules.order import Indices

Place = tuple[int, Any]  # a position in the stream, and the sample that is there


class PlacedSampler(Sampler[list[Place]]):
    """The micro-batches of a `TrainSampler`, with the position of each sample."""

    def __init__(self, micro_batches: TrainSampler) -> None:
        self._micro_batches, self.order = micro_batches, micro_batches.order
        self.first_position = micro_batches.first_position

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[list[Place]]:
        for first, indices in zip(self._micro_batches.starts(), self._micro_batches, strict=True):
            yield list(enumerate(indices.tolist(), first))


class PlacedOnce(Sampler[list[Place]]):
    """Batches of the samples `chosen`, each given by their positions among them."""

    def __init__(self, chosen: Indices, batches: list[Indices]) -> None:
        self._chosen, self._batches = chosen, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Place]]:
        for positions in self._batches:
            yield list(zip(positions.tolist(), self._chosen[positions].tolist(), strict=True))


class PlacedBatches(Dataset[Any]):
    """Reads and collates a batch at a time, each sample under the seed of its position.

    So what a transform draws (a crop, a flip) is the same on whichever rank and in whichever worker it is drawn, and
    again when a run goes on. A data set that reads many samples at once draws by the first of them, as does what
    collates. To all others it is the user's own data set.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], *place: object) -> None:
        self.dataset, self._collate, self._place = dataset, collate, place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, places: Sequence[Place]) -> Any:
        with draws_apart():
            samples = self._read(places)
            seed_by(*self._place, "collate", places[0][0])
            return self._collate(samples)

    def _read(self, places: Sequence[Place]) -> list[Any]:
        if reads_many(self.dataset):
            seed_by(*self._place, places[0][0])
            many: list[Any] = self.dataset.__getitems__([index for _, index in places])
            return many
        return [self._read_one(position, index) for position, index in places]

    def _read_one(self, position: int, index: Any) -> Any:
        seed_by(*self._place, position)
        return self.dataset[index]


def reads_many(dataset: Any) -> bool:
    """Whether a data set has a way to read many samples at once; torch's subsets have only what they are made of."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def as_it_is(batch: Any) -> Any:
    """Collates what is collated already."""
    return batch


def begin_own_worker(number: int, *, data_rank: int, own: Callable[[int], None] | None) -> None:
    """Seed a worker by data rank, and let the user's own function see the user's own data set."""
    begin_worker(number, data_rank=data_rank)
    info = get_worker_info()
    if info is not None:
        own_set = getattr(info.dataset, "dataset", info.dataset)
        object.__setattr__(info, "dataset", own_set)  # it lets nobody set anything
    if own is not None:
        own(number)
