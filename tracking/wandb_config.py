"""What a user may say of W&B, and the names that writing and reading share; imports neither W&B nor Lightning."""

import os
import secrets
from typing import Literal, final

from pydantic import BaseModel, ConfigDict

AXES = ("step", "tokens", "time_s")  # in every row, so that a chart can be drawn against any of them
# Files of the run folder that go with the run; resolved.yaml does not: it holds secrets that the logged config has not.
RUN_FILES = ("record.json", "trace.json", "certificate.json")
COMPARE = "compare"  # job type of what is no run, but holds a comparison of runs


@final
class WandbConfig(BaseModel):
    """`auto` is online where an API key is found (or WANDB_MODE says so), else offline; `disabled` makes no run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str = "concord"
    entity: str | None = None
    group: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: tuple[str, ...] = ()


def new_run_id() -> str:
    """Of a run that a W&B agent has started, the id that its sweep knows it by; else one that nobody else has."""
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return given or secrets.token_hex(4)
