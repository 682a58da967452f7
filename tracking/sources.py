"""Runs from where they are left: a run folder, the folder of a sweep, or W&B."""

import csv
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tracking.certified import Verdict
from tracking.history import History, read_history
from tracking.record import RunRecord
from tracking.status import read_status

RUN_FILES = ("record.json", "status.json", "resolved.yaml")  # any of them makes a folder a run folder
WANDB_PREFIX = "wandb:"


@dataclass(frozen=True, kw_only=True)
class Event:
    """A stretch of a traced step on one lane of one rank; times in microseconds on a clock that all ranks share."""

    category: str
    name: str
    rank: int
    lane: int
    start: float
    duration: float
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is left of a run: its record if it completed, else what became of it.

    history: columns of metrics.csv, those of all attempts joined.
    notes: a line for each of its files that cannot be read.
    """

    name: str
    strategy: str | None
    state: str
    error: str | None = None
    record: RunRecord | None = None
    folder: Path | None = None
    history: History = field(default_factory=dict)
    trace: list[Event] = field(default_factory=list)
    verdict: Verdict | None = None
    notes: tuple[str, ...] = ()


def read_run(folder: Path) -> Run:
    """The run in `folder`; a damaged record or status makes it a failed run, with the reason as its error."""
    path = folder / "record.json"
    left: dict[str, Any] = {"folder": folder, **_read_extras(folder)}
    try:
        record = RunRecord.read(path) if path.exists() else None
        status = read_status(folder)
    except ValueError as error:
        return Run(name=folder.name, strategy=None, state="failed", error=str(error).splitlines()[0], **left)
    if status is not None:
        name, strategy, state, error_text = status.name, status.strategy, status.state, status.error
        return Run(name=name, strategy=strategy, state=state, error=error_text, record=record, **left)
    if record is not None:
        return Run(name=record.name, strategy=record.strategy, state="completed", record=record, **left)
    return Run(name=folder.name, strategy=None, state="lost", error="it has no status.json", **left)


def read_runs(folder: Path) -> list[Run]:
    """The run in `folder`, or the runs one level down (a sweep) in the order of their job numbers.

    Raises ValueError when there is no run.
    """
    paths = _run_folders(folder)
    if not paths:
        raise _no_run(folder)
    return [read_run(path) for path in paths]


def collect(sources: Sequence[str]) -> list[Run]:
    """The runs of all `sources`, each once: folders of runs and of sweeps, `wandb:entity/project/group`, and what
    W&B has left in a folder that has no other files of runs.

    Raises ValueError when a source has no run.
    """
    runs: dict[str, Run] = {}  # by their real place, as it was given first
    for source in sources:
        for place, run in _read_source(source, known=runs.keys()):
            runs[place] = run
    return list(runs.values())


def _read_source(source: str, known: Collection[str]) -> Iterator[tuple[str, Run]]:
    """The runs of one source, but for those of folders that are `known`."""
    if source.startswith(WANDB_PREFIX):
        from tracking.wandb_source import read_group  # imports W&B, which a second goes by in

        yield from read_group(source).items()
        return
    folder = Path(source).expanduser()
    paths = (
        [] if any(folder.glob("*.wandb")) else _run_folders(folder)
    )  # beside that file, files/ is not all of the run
    for path in paths:
        if str(path.resolve()) not in known:
            yield str(path.resolve()), read_run(path)
    if not paths:
        yield from _read_offline(folder).items()


def _read_offline(folder: Path) -> dict[str, Run]:
    from tracking.wandb_source import read_offline

    runs = read_offline(folder)
    if not runs:
        raise _no_run(folder)
    return runs


def read_trace(path: Path) -> list[Event]:
    """The events of a file in Chrome's trace format.

    Raises ValueError when it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["traceEvents"] if isinstance(content, dict) else content
        return [
            Event(
                category=event["cat"],
                name=event["name"],
                rank=int(event["pid"]),
                lane=int(event["tid"]),
                start=float(event["ts"]),
                duration=float(event["dur"]),
                details=event.get("args", {}),
            )
            for event in found
            if event["ph"] == "X"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no Chrome trace: {type(error).__name__} {error}") from None


def _read_extras(folder: Path) -> dict[str, Any]:
    """What a run can do without: its history, trace and verdict; a note for each that cannot be read."""
    extras: dict[str, Any] = {}
    notes = []
    try:
        extras["history"] = read_history(folder)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        notes.append(f"{folder.name}/metrics.csv is damaged: {error}")
    try:
        if (folder / "trace.json").is_file():
            extras["trace"] = read_trace(folder / "trace.json")
    except ValueError as error:
        notes.append(str(error))
    try:
        if (folder / "certificate.json").is_file():
            extras["verdict"] = Verdict.model_validate_json((folder / "certificate.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        notes.append(f"{folder.name}/certificate.json is damaged: {error.errors()[0]['msg']}")
    return extras | {"notes": tuple(notes)}


def _no_run(folder: Path) -> ValueError:
    return ValueError(f"{folder} holds no run; give a run's folder, or that of a sweep.")


def _run_folders(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    jobs = [path for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    return sorted(jobs, key=_job_number)


def _is_run(folder: Path) -> bool:
    return not folder.name.startswith(".") and any((folder / name).is_file() for name in RUN_FILES)


def _job_number(folder: Path) -> tuple[bool, int, str]:
    """Numbered jobs first and by number: 2 before 10."""
    is_number = folder.name.isdecimal()
    return not is_number, int(folder.name) if is_number else 0, folder.name
