"""Samples as PyTorch loaders under a Lightning Trainer: every rank reads its own slice of every step."""

import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.order import Indices, Order, Stream, evaluation_batches, evenly_spaced
from datamodules.refused import RefusedError
from datamodules.spec import Data, SampledData, Samples

Batch = torch.Tensor | list[torch.Tensor]


def begin_worker(number: int, *, data_rank: int) -> None:
    """Seed a loader's worker as Lightning does, by data rank, and have it let the first signal to end pass.

    Who ends a job may send it to all processes; the run then ends in order, and its workers with it. A second one comes
    from the rank itself, to a worker that is still there.
    """
    pl_worker_init_function(number, rank=data_rank)

    def pass_over(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ending, pass_over)


class TrainSampler(Sampler[Indices]):
    """Micro-batches of one data rank, from `first_step` to the end of the run.

    Its length is that of the whole run: on resume Lightning counts the micro-batches before `first_step` as done.
    """

    def __init__(
        self, order: Stream, *, micro_batch_size: int, data_rank: int, data_ranks: int, first_step: int, last_step: int
    ) -> None:
        self.order, self.micro_batch_size = order, micro_batch_size
        self._slice = {"micro_batch_size": micro_batch_size, "data_rank": data_rank, "data_ranks": data_ranks}
        self._num_micro_batches = order.global_batch_size // (micro_batch_size * data_ranks)
        self._first_step, self._last_step = first_step, last_step

    def __len__(self) -> int:
        return self._last_step * self._num_micro_batches

    def __iter__(self) -> Iterator[Indices]:
        for first in self.starts():
            yield self.order.indices(first, self.micro_batch_size)

    @property
    def first_position(self) -> int:
        return self._first_step * self.order.global_batch_size

    def starts(self) -> Iterator[int]:
        """The position of each micro-batch's first sample."""
        for step in range(self._first_step, self._last_step):
            for micro in range(self._num_micro_batches):
                yield self.order.first(step, micro, **self._slice)


def train_sampler(order: Stream, data: Data, trainer: Trainer) -> TrainSampler:
    """Micro-batches of this process, from the trainer's optimizer step to its last.

    ValueError when its accumulation is wrong.
    """
    data_rank, data_ranks = data_slice(trainer)
    per_pass = data.micro_batch_size * data_ranks
    if data.global_batch_size != per_pass * trainer.accumulate_grad_batches:
        raise RefusedError(
            f"data.global_batch_size={data.global_batch_size} is not data.micro_batch_size="
            f"{data.micro_batch_size} x {data_ranks} data ranks x accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}; give a global batch that is."
        )
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress  # Lightning counts other steps where a module makes them
    return TrainSampler(
        order,
        micro_batch_size=data.micro_batch_size,
        data_rank=data_rank,
        data_ranks=data_ranks,
        first_step=batches.total.processed // trainer.accumulate_grad_batches,
        last_step=trainer.max_steps,
    )


def data_slice(trainer: Trainer) -> tuple[int, int]:
    """This process's data rank, and the number of data ranks."""
    # Lightning's own strategy for one process does not say.
    slicing = getattr(trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
    return slicing["rank"], slicing["num_replicas"]


class BatchDataset(Dataset[Batch]):
    """Samples read a whole micro-batch at a time: one gather, no collation of single samples.

    One array comes as one tensor, several as a list of them, as PyTorch's own collation and pinning have it.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, indices: Indices) -> Batch:
        tensors = [torch.from_numpy(array) for array in self._samples.batch(indices)]
        return tensors[0] if len(tensors) == 1 else tensors


class ShapesDataset(BatchDataset):
    """Batches of the right shapes and formats on the meta device, for ranks that look at no sample."""

    def __getitem__(self, indices: Indices) -> Batch:
        first = super().__getitem__(indices[:1])
        if isinstance(first, torch.Tensor):
            return many(first, len(indices))
        return [many(tensor, len(indices)) for tensor in first]


def many(one: torch.Tensor, count: int) -> torch.Tensor:
    """A meta tensor like a batch of `count` samples, given a batch of one."""
    return torch.empty(count, *one.shape[1:], dtype=one.dtype, device="meta")


class TrainLoader(DataLoader[Batch]):
    """A loader that Lightning knows it may resume in mid-epoch.

    It has no state of its own: where it starts follows from the optimizer step that the trainer has restored.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class SampleDataModule(LightningDataModule):
    """Lightning's side of any `SampledData`; the trainer says which slice, from which step and to which."""

    def __init__(self, data: SampledData) -> None:
        super().__init__()
        self._data = data

    def train_dataloader(self) -> TrainLoader:
        """Micro-batches from the trainer's optimizer step to its last; ValueError when its accumulation is wrong."""
        data, samples = self._data, self._data.train_samples()
        order = Order(num_samples=len(samples), global_batch_size=data.global_batch_size, seed=data.seed)
        sampler = train_sampler(order, data, self._trainer)
        return TrainLoader(self._batches(samples), sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same samples whatever the strategy; their batches differ in size by at most one."""
        samples = self._data.val_samples()
        chosen = evenly_spaced(len(samples), self._data.max_val_samples)
        size = self._data.val_batch_size or self._data.micro_batch_size
        batches = evaluation_batches(len(chosen), size, *data_slice(self._trainer))
        sampler = [chosen[batch] for batch in batches]
        return DataLoader(self._batches(samples), sampler=sampler, **self._loading())

    @property
    def _trainer(self) -> Any:
        assert self.trainer is not None, "Lightning sets the trainer before it asks for a loader"
        return self.trainer

    @property
    def _sees_batches(self) -> bool:
        """Whether this rank looks at samples; Lightning's own strategies, which do not say, have every rank do so."""
        return getattr(self._trainer.strategy, "sees_batches", True)

    def _batches(self, samples: Samples) -> BatchDataset:
        return BatchDataset(samples) if self._sees_batches else ShapesDataset(samples)

    def _loading(self) -> dict[str, Any]:
        num_workers = self._data.num_workers if self._sees_batches else 0
        return {
            "batch_size": None,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "worker_init_fn": partial(begin_worker, data_rank=data_slice(self._trainer)[0]),
            "pin_memory": self._sees_batches and self._trainer.strategy.root_device.type == "cuda",
        }
