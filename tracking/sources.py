"""RunRecords from where runs leave them: a run folder, or the folder of a sweep."""

from dataclasses import dataclass
from pathlib import Path

from tracking.record import RunRecord
from tracking.status import read_status

RUN_FILES = ("record.json", "status.json", "resolved.yaml")  # any of them makes a folder a run folder


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is left of a run: its record if it completed, else what became of it."""

    name: str
    strategy: str | None
    state: str
    error: str | None = None
    record: RunRecord | None = None


def read_run(folder: Path) -> Run:
    """The run in `folder`; a file of it that cannot be read makes it a failed run, with the reason as its error."""
    path = folder / "record.json"
    try:
        record = RunRecord.read(path) if path.exists() else None
        status = read_status(folder)
    except ValueError as error:
        return Run(name=folder.name, strategy=None, state="failed", error=str(error).splitlines()[0])
    if status is not None:
        name, strategy, state, error_text = status.name, status.strategy, status.state, status.error
        return Run(name=name, strategy=strategy, state=state, error=error_text, record=record)
    if record is not None:
        return Run(name=record.name, strategy=record.strategy, state="completed", record=record)
    return Run(name=folder.name, strategy=None, state="lost", error="it has no status.json")


def read_runs(folder: Path) -> list[Run]:
    """The run in `folder`, or the runs one level down (a sweep) in the order of their job numbers.

    Raises ValueError when there is no run.
    """
    if _is_run(folder):
        return [read_run(folder)]
    jobs = [path for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    if not jobs:
        raise ValueError(f"{folder} holds no run; give a run's folder, or that of a sweep.")
    return [read_run(path) for path in sorted(jobs, key=_job_number)]


def _is_run(folder: Path) -> bool:
    return not folder.name.startswith(".") and any((folder / name).is_file() for name in RUN_FILES)


def _job_number(folder: Path) -> tuple[bool, int, str]:
    """Numbered jobs first and by number: 2 before 10."""
    is_number = folder.name.isdecimal()
    return not is_number, int(folder.name) if is_number else 0, folder.name
