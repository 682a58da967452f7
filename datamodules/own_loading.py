"""Loaders of a user's own LightningDataModule, taken apart and made again in Concord's order of samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import numpy as np
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from datamodules.draws import draws_apart, seed_by
from datamodules.endless import Again, Endless
from datamodules.loading import TrainSampler, data_slice, train_sampler
from datamodules.order import Indices, Stream, evaluation_batches, evenly_spaced
from datamodules.own import OwnData
from datamodules.own_order import listed, stream_of
from datamodules.placed import PlacedBatches, PlacedOnce, PlacedSampler, as_it_is, begin_own_worker
from datamodules.refused import RefusedError

# Where samples are evaluated in an order that changes nothing, they come as they lie.
PLAIN = (SequentialSampler, RandomSampler, DistributedSampler)


def order_of(trainer: Trainer) -> Stream | None:
    """The order in which a trainer reads its samples; None where that is not Concord's to say."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    return sampler.order if isinstance(sampler, TrainSampler | PlacedSampler) else None


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """What only a rank can know of data of the user's own, by key; nothing where the config says it all."""
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, PlacedSampler):
        return {}
    return {"data.samples": sized_len(loader.dataset), "data.order": sampler.order.described}


def arrange(module: LightningDataModule, data: OwnData) -> LightningDataModule:
    """The user's module itself, whose loaders Lightning gets in Concord's order; all else of it stays as it is."""
    loaders = OwnLoaders(module, data)
    if not is_overridden("train_dataloader", module):
        raise RefusedError(f"data.module: {loaders.name} has no train_dataloader(); give it one.")
    for hook, remake in (("train_dataloader", loaders.train), ("val_dataloader", loaders.val)):
        if is_overridden(hook, module):
            setattr(module, hook, remade_by(remake, getattr(module, hook)))
    return module


def remade_by(remake: Callable[[Any], Any], own: Callable[[], Any]) -> Callable[[], Any]:
    def dataloader() -> Any:  # a function: Lightning looks at the code of a hook to see whether there is one
        return remake(own())

    return dataloader


class OwnLoaders:
    """What becomes of the loaders that a user's module gives."""

    def __init__(self, module: LightningDataModule, data: OwnData) -> None:
        self.module, self.data, self.name = module, data, type(module).__name__

    @property
    def trainer(self) -> Trainer:
        assert self.module.trainer is not None, "Lightning sets the trainer before it asks for a loader"
        return self.module.trainer

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self, loader: Any) -> Any:
        """The training loader, in the order of the stream, or endless where it can only be read from its start."""
        if isinstance(loader, CombinedLoader | dict | list | tuple):
            raise RefusedError(
                f"data.module: {self.name}.train_dataloader() gives several loaders, of which there is no telling how "
                f"many samples a step has; give one, over a data set that holds them all (ConcatDataset, or one of "
                f"your own that joins them)."
            )
        if not isinstance(loader, DataLoader):
            self.check_split(loader, "training")
            return Again(loader, self.data.micro_batch_size)
        if isinstance(loader.dataset, IterableDataset):
            return self.endless(loader)
        return self.in_order(loader)

    def in_order(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        data = self.data
        if loader.batch_sampler is None:
            raise RefusedError(
                f"data.module: the training loader of {self.name} has batch_size=None, so that its data set makes the "
                f"batches; let it give samples, and the loader batch_size={data.micro_batch_size}."
            )
        batch_size = self.checked_batch_size(loader)
        order = stream_of(loader, batch_size=batch_size, global_batch_size=data.global_batch_size, seed=data.seed)
        micro_batches = PlacedSampler(train_sampler(order, data, self.trainer))
        of_step = order.indices(micro_batches.first_position, data.global_batch_size).tolist()
        self.check_alike([sized_len(loader.dataset), order.described, of_step], "train")
        made = self.placed(loader, micro_batches, "train", batch_size=data.micro_batch_size)
        # Lightning knows by these that it may go on in mid-epoch. Where to follows from the step.
        vars(made).update(state_dict=dict, load_state_dict=as_it_is)
        return made

    def endless(self, loader: DataLoader[Any]) -> Any:
        self.check_split(loader.dataset, "training")
        if loader.batch_sampler is None:
            return Again(remade(loader, worker_init_fn=self.worker_init_fn(loader)), self.data.micro_batch_size)
        self.checked_batch_size(loader)
        size = self.data.micro_batch_size
        return remade(
            loader,
            dataset=Endless(cast(Any, loader.dataset)),
            batch_sampler=BatchSampler(loader.sampler, size, drop_last=False),
            batch_size=size,
            worker_init_fn=self.worker_init_fn(loader),
        )

    def checked_batch_size(self, loader: DataLoader[Any]) -> int:
        """How many samples the loader itself would give at a time; ValueError where something else is stated."""
        stated = self.data.loader_batch_size or self.data.micro_batch_size
        size: int = getattr(loader.batch_sampler, "batch_size", None) or stated
        if size not in (stated, self.data.micro_batch_size):
            key = "loader_batch_size" if self.data.loader_batch_size else "micro_batch_size"
            raise RefusedError(
                f"data.{key}={stated}, but the training loader of {self.name} has batch_size={size}; set "
                f"data.micro_batch_size={size} (and a data.global_batch_size that it divides), or give the loader "
                f"batch_size={stated}."
            )
        return size

    # --- validation -------------------------------------------------------------------------------------------------

    def val(self, loaders: Any) -> Any:
        """Loaders of every sample once, over all ranks; as many as the user's module gives."""
        if isinstance(loaders, CombinedLoader):
            loaders.flattened = [self.val_loader(loader) for loader in loaders.flattened]
            return loaders
        return tree_map(self.val_loader, loaders)

    def val_loader(self, loader: Any) -> Any:
        if loader is None:
            return None
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            self.check_split(loader, "validation")
            return loader
        if isinstance(loader.dataset, IterableDataset):
            self.check_split(loader.dataset, "validation")
            return remade(loader, worker_init_fn=self.worker_init_fn(loader))
        indices = evaluated(loader, self.data.seed)
        chosen = indices[evenly_spaced(len(indices), self.data.max_val_samples)]
        self.check_alike(chosen.tolist(), "val")
        size = self.data.val_batch_size or getattr(loader.batch_sampler, "batch_size", None)
        batches = evaluation_batches(len(chosen), size or self.data.micro_batch_size, *data_slice(self.trainer))
        return self.placed(loader, PlacedOnce(chosen, batches), "val")

    # --- both -------------------------------------------------------------------------------------------------------

    def placed(self, loader: DataLoader[Any], batches: PlacedSampler | PlacedOnce, split: str, **more: Any) -> Any:
        return remade(
            loader,
            dataset=PlacedBatches(loader.dataset, loader.collate_fn, self.data.seed, split),
            collate_fn=as_it_is,
            sampler=batches,
            batch_sampler=batches,
            drop_last=False,
            worker_init_fn=self.worker_init_fn(loader),
            **more,
        )

    def worker_init_fn(self, loader: DataLoader[Any]) -> Callable[[int], None]:
        return partial(begin_own_worker, data_rank=data_slice(self.trainer)[0], own=loader.worker_init_fn)

    def check_split(self, source: object, purpose: str) -> None:
        """ValueError where ranks would each read all of what only its own code can split."""
        _, data_ranks = data_slice(self.trainer)
        if data_ranks > 1 and not self.data.splits_itself:
            raise RefusedError(
                f"data.module: {type(source).__name__}, of {self.name}'s {purpose}, is read by its own code, and all "
                f"{data_ranks} data ranks would read the same; have it give a rank its share by trainer.strategy."
                f"distributed_sampler_kwargs and set data.splits_itself=true, or choose a data set with __getitem__."
            )

    def check_alike(self, what: list[Any], split: str) -> None:
        """ValueError on a rank that has other samples to choose from, or another order, than rank 0."""
        told = blake2b(repr(what).encode()).hexdigest()
        if self.trainer.strategy.broadcast(told) != told:
            raise RefusedError(
                f"data.module: {self.name}.{split}_dataloader() gives rank {self.trainer.global_rank} other samples, "
                f"or another order, than rank 0; let what it draws follow from a seed, and not from the rank."
            )


def evaluated(loader: DataLoader[Any], seed: int) -> Indices:
    """Every sample that a loader would evaluate, in an order that each rank finds alike."""
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler and type(batches.sampler) in PLAIN:
        return np.arange(len(cast(Any, loader.dataset)))
    with draws_apart():
        seed_by(seed, "val sampler")
        return listed([index for batch in batches for index in batch])


def remade(loader: DataLoader[Any], **changes: Any) -> Any:
    """A copy of a loader, of whatever class, in which something is changed and all else is as it was.

    Copied, and not constructed: what a class of the user's takes to be constructed nobody knows.
    """
    made = copy.copy(loader)
    # Past DataLoader's own __setattr__, which refuses these. What comes out of order could not be gone on with.
    vars(made).update(changes, in_order=True, _iterator=None)
    # Lightning has noted how it was constructed, to tell of what it finds wrong with that; it is not true any more.
    for noted in [name for name in vars(made) if name.startswith("__pl_saved")]:
        del vars(made)[noted]
    return made
