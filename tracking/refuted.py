"""Certificates that a run's own losses speak against: such a run is not called certified."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tracking.certified import OTHER_SAMPLES, without
from tracking.comparability import beginning
from tracking.record import RunRecord

# Digits to which losses must be the same to be said to agree: bfloat16 keeps 8 bits, a little over two digits, and
# what differs in the third is more than the formats that runs train in explain.
AGREED_DIGITS = 3

# What a strategy may choose for itself, and what only says which samples are validated and how they are read.
OWN_CHOICES = ("micro_batch_size", *(key for key in OTHER_SAMPLES if key != "seed"))


def is_refuted(
    figures: Mapping[str, Any], run: RunRecord, reference: RunRecord | None, theirs: Iterable[float]
) -> bool:
    """Whether the run's losses are not those of a reference that was to train the same thing.

    figures: of `RunFigures`, loss_digits and diverged. theirs: the reference's losses.
    """
    if reference is None or training_of(run) != training_of(reference):
        return False  # they were to differ
    digits = figures["loss_digits"]
    diverged_alone = bool(figures["diverged"]) and all(map(math.isfinite, theirs))
    return diverged_alone or (digits is not None and digits < AGREED_DIGITS)


def training_of(record: RunRecord) -> list[Any]:
    """What settles a run's losses, but for rounding, under every strategy."""
    config = record.config
    trainer = config.get("trainer", {})
    return [
        *(config.get(key) for key in ("model", "optimizer", "scheduler", "precision", "weights", "data_digest")),
        without(config.get("data", {}), OWN_CHOICES),
        [trainer.get(key) for key in ("clip_norm", "sync_batchnorm", "on_nan")],
        record.seed,
        beginning(record),
    ]
