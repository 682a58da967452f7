"""Which runs a certificate speaks for: those that compute the same thing, in the same setting, with the same code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tracking.record import RunRecord

RUNS = Path("runs")  # where all runs go, unless they are told otherwise
VERIFIED = "*/*-verify/*/certificate.json"  # below the folder of all runs: where scripts/verify.py leaves them

# What a strategy does is the same at every learning rate, and for any number of steps.
NUMBERS_OF_TRAINING = ("optimizer", "scheduler", "weights")
RATES = ("lr", "weight_decay", "momentum", "betas", "eps")
# Of the data, which samples come when, how they are read, and what is validated.
OTHER_SAMPLES = ("seed", "num_workers", "max_val_samples", "val_batch_size")


class Verdict(BaseModel):
    """What a comparison needs of a certificate; `tracking.agreement` has all of it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    verdict: Literal["agrees", "disagrees"]
    strategy: str
    subject: str | None = None  # None of a certificate of before there were subjects
    environment: dict[str, Any] = {}

    def speaks_for(self, record: RunRecord) -> bool:
        """Whether the run did what was certified, with the same code and the same versions."""
        own = record.environment
        if own.revision is None or own.source is None:
            return False  # outside of git nobody knows whether it is the same code
        code = {"torch": own.torch, "lightning": own.lightning, "revision": own.revision, "source": own.source}
        return self.subject == subject_of(record) and code.items() <= self.environment.items()


def setting_of(record: RunRecord) -> dict[str, Any]:
    """What a certificate says of the setting that it was made in, in words and numbers; of what ran, where it is known.

    A certificate holds in this setting alone: another batch, sequence length or clipping is another computation.
    """
    config, found = record.config, record.found
    optimizer = str(config.get("optimizer", {}).get("_target_"))
    return {
        "model": record.model,
        "parameters": record.model_stats.parameters,
        "data": record.data,
        "sample_shapes": found and found.samples.shapes,
        "tokens_per_sample": record.batch.tokens_per_sample,
        "global_batch_size": record.batch.global_,
        "micro_batch_size": record.batch.micro,
        "clip_norm": config.get("trainer", {}).get("clip_norm"),
        "precision": record.precision.model_dump(),
        "optimizer": [one.name for one in found.optimizers] if found else [optimizer],
        "world_size": record.world_size,
    }


def subject_of(record: RunRecord) -> str:
    """Twelve hex digits, equal for runs of which one's certificate holds for the other.

    Equal are the setting, and of the config the strategy, the net, the data but for their order, the kinds of optimizer
    and schedule with all that is no rate, and what else changes how a step is computed.
    """
    config = record.config
    trainer = config.get("trainer", {})
    facts = [
        setting_of(record),
        without(config.get("model", {}), NUMBERS_OF_TRAINING),
        without(config.get("data", {}), OTHER_SAMPLES),
        without(config.get("optimizer", {}), RATES),
        config.get("scheduler", {}).get("_target_"),
        [trainer.get(key) for key in ("sync_batchnorm", "on_nan")],
        *(config.get(key) for key in ("strategy", "precision", "compile")),
    ]
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def without(section: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def certificates_below(runs: Path) -> list[Verdict]:
    """All that `scripts/verify.py` has left below the folder of all runs, the newest first."""
    found = []
    for path in sorted(runs.glob(VERIFIED), reverse=True):
        try:
            found.append(Verdict.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValidationError):
            continue  # a damaged one proves nothing
    return found


def verdict_on(record: RunRecord, certificates: Iterable[Verdict]) -> Literal["agrees", "disagrees"] | None:
    """That of the first certificate that speaks for the run; None if there is none."""
    return next((one.verdict for one in certificates if one.speaks_for(record)), None)
