"""FLOPs of a model's step: counted before it is built, or by its first batch where there is no sample before that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from models.stats import ModelStats, measure
from strategies.engines.draws import left_alone
from tracking.meter import Meter


def counted(model: pl.LightningModule, sample: Callable[[], Any]) -> ModelStats | None:
    """Counts of a training step of the model, which is on the meta device, on a batch of one sample.

    None, and a line that says why, where they cannot be made: a step that needs values, for one.
    """
    if not model.automatic_optimization:
        print(f"FLOPs and MFU are not measured: {type(model).__name__} optimizes manually.")
        return None
    try:
        return measure(model, sample())
    except Exception as error:  # noqa: BLE001  # what meta cannot do, or one sample is too few for: the step is the user's
        reason = str(error).strip() or type(error).__name__
        print(f"FLOPs and MFU are not measured: {reason.splitlines()[0]}")
        return None


def first_row(batch: Any, size: int) -> Any:
    """The first of a batch of `size` samples, as a batch of one; ValueError where there is no telling which it is."""
    if not any(is_rows(leaf, size) for leaf in tree_leaves(batch)):
        raise ValueError(f"no tensor of the first batch has data.micro_batch_size={size} rows.")
    return tree_map(lambda leaf: leaf[:1] if is_rows(leaf, size) else leaf, batch)


def is_rows(leaf: object, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size


class CountsFirstBatch(pl.Callback):
    """Tells the meter, by the first batch, what a sample costs; `model` is on the meta device. Put it on one rank."""

    def __init__(self, model: pl.LightningModule, meter: Meter, micro_batch_size: int) -> None:
        self.model: pl.LightningModule | None = model
        self.meter, self.micro_batch_size = meter, micro_batch_size

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.model is None:
            return
        model, self.model = self.model, None
        with left_alone(trainer.strategy.root_device):
            stats = counted(model, lambda: first_row(batch, self.micro_batch_size))
        if stats is not None:
            self.meter.flops_per_sample = stats.flops_per_sample
