"""Which runs a certificate speaks for: those that compute the same thing with the same code."""

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
        if own.revision is None:
            return False  # outside of git nobody knows whether it is the same code
        code = {"torch": own.torch, "lightning": own.lightning, "revision": own.revision}
        return self.subject == subject_of(record.config, record.world_size) and code.items() <= self.environment.items()


def subject_of(config: Mapping[str, Any], world_size: int) -> str:
    """Twelve hex digits, equal for runs of which one's certificate holds for the other.

    Equal are the strategy with its keys, the world size, the net, the kind of data, optimizer, precision and compile.
    """
    model = {key: value for key, value in config.get("model", {}).items() if key not in NUMBERS_OF_TRAINING}
    facts = [
        world_size,
        model,
        *(config.get(key) for key in ("strategy", "precision", "compile")),
        *(config.get(section, {}).get("_target_") for section in ("data", "optimizer")),
    ]
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


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
