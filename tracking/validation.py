"""Validation metrics are those of all data ranks' samples, also where a module logs them without sync_dist."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, Protocol, cast, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

DIGEST_BITS = 16  # the squares of so short digests are averaged exactly enough in float64
SAME = 1e-5  # a variance of digests below this is none: of 1024 ranks, one that differs by 1 has 1e-3


class Slices(Protocol):
    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]: ...


@final
class SharedValidation(pl.Callback):
    """Reduces over the ranks what `validation_step` logs for a whole validation, as sync_dist=True has Lightning do it.

    Without it each rank keeps the value of its own samples, and a record takes the first rank's for the whole. Ranks
    that do not all log the same are left alone: who waits for the others' values would wait for ever. What is left to
    one rank is in `own`, by its key.
    """

    def __init__(self) -> None:
        self.own: list[str] = []
        self.shared: set[str] = set()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx > 0 or not is_spread(trainer):
            return
        logged = {key: metric for key, metric in unshared(trainer) if is_of_step(metric, dataloader_idx)}
        if not alike_everywhere(trainer, sorted(logged)):
            return
        for key, metric in logged.items():
            sync = metric.meta.sync
            # Not `sync.should`, by which Lightning tells whether a metric is logged with other arguments than before.
            sync._fn = partial(cast(Any, sync.fn), reduce_op=sync.op, group=sync.group)
            self.shared.add(key)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_spread(trainer):
            own = {metric.meta.name for key, metric in unshared(trainer) if key not in self.shared}
            self.own = sorted(own.union(self.own))


def is_spread(trainer: pl.Trainer) -> bool:
    """Whether ranks validate on unlike samples."""
    return cast(Slices, trainer.strategy).distributed_sampler_kwargs["num_replicas"] > 1


def unshared(trainer: pl.Trainer) -> Iterator[tuple[str, _ResultMetric]]:
    """What has been logged of a validation as a number, and is each rank's own without being meant to be."""
    for key, metric in trainer.fit_loop.epoch_loop.val_loop._results.items():
        sync = metric.meta.sync
        if metric.is_tensor and metric.meta.on_epoch and not sync.should and not sync.rank_zero_only:
            yield key, metric


def is_of_step(metric: _ResultMetric, dataloader_idx: int) -> bool:
    """Whether `validation_step` logs it, for this loader, and for the whole validation alone."""
    meta = metric.meta
    of_loader = meta.dataloader_idx in (None, dataloader_idx)
    return meta.fx.startswith("validation_step") and not meta.on_step and of_loader and not metric.has_reset


def alike_everywhere(trainer: pl.Trainer, keys: Sequence[str]) -> bool:
    """Whether all ranks have the same keys; collective, with the same answer on all."""
    digest = int(sha256(json.dumps(keys).encode()).hexdigest(), 16) % 2**DIGEST_BITS
    moments = torch.tensor([digest, digest**2], dtype=torch.float64, device=trainer.strategy.root_device)
    mean, square = cast(torch.Tensor, trainer.strategy.reduce(moments, reduce_op="mean")).tolist()
    return abs(square - mean**2) < SAME
