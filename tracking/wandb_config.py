"""What a user may say of W&B, and the names that writing and reading share; imports neither W&B nor Lightning."""

import os
import secrets
from collections.abc import Iterable
from typing import Literal, NamedTuple, Self, final

from pydantic import BaseModel, ConfigDict

from tracking.sources import WANDB_PREFIX, Run

AXES = ("step", "tokens", "time_s")  # in every row, so that a chart can be drawn against any of them
# Files of the run folder that go with the run; resolved.yaml does not: it holds secrets that the logged config has not.
RUN_FILES = ("record.json", "trace.json", "certificate.json")
Mode = Literal["online", "offline", "disabled"]
# What WANDB_MODE may say, and what it means.
ENVIRONMENT_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
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


class Group(NamedTuple):
    """Runs that W&B shows together; without an entity, those of the user's default one."""

    entity: str | None
    project: str
    name: str

    @classmethod
    def parse(cls, source: str) -> Self:
        """That of `wandb:entity/project/group`; ValueError in one line for anything else."""
        parts = source.removeprefix(WANDB_PREFIX).split("/")
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{source} is no group of runs; write wandb:<entity>/<project>/<group>.")
        return cls(*parts)


def groups_of(sources: Iterable[str], runs: Iterable[Run]) -> list[Group]:
    """The groups that are named by `sources`, and those that `runs` from folders say they are in.

    Raises ValueError in one line where there is none, or where they are of several projects.
    """
    named = [Group.parse(source) for source in sources if source.startswith(WANDB_PREFIX)]
    records = [run.record for run in runs if run.record is not None and run.folder is not None]
    configs = [WandbConfig.model_validate(record.config.get("logger", {})) for record in records]
    groups = list(dict.fromkeys(named + [Group(one.entity, one.project, one.group) for one in configs if one.group]))
    if not groups:
        raise ValueError("The runs are in no group of W&B; start them as a sweep, or with logger.group=<name>.")
    if len({group[:2] for group in groups}) > 1:
        texts = ["/".join(part for part in group if part) for group in groups]
        raise ValueError(f"{' and '.join(texts)} are not of one project; make a report of each.")
    return groups


def logger_of(runs: Iterable[Run]) -> WandbConfig:
    """How `runs` were logged: as the first of those that completed says, in the group that they share, if they do."""
    records = [run.record for run in runs if run.record is not None]
    groups = {record.group for record in records}
    config = (
        WandbConfig.model_validate(records[0].config.get("logger", {})) if records else WandbConfig(mode="disabled")
    )
    return config.model_copy(update={"group": groups.pop() if len(groups) == 1 else None})


def new_run_id() -> str:
    """Of a run that a W&B agent has started, the id that its sweep knows it by; else one that nobody else has."""
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return given or secrets.token_hex(4)
