"""RunRecords from where runs leave them: a run folder, or the folder of a sweep."""

import json
from dataclasses import dataclass
from pathlib import Path

from tracking.record import RunRecord

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
    """The run in `folder`; a record that cannot be read makes it a failed run, with the reason as its error."""
    status = _read_status(folder / "status.json")
    if (folder / "record.json").exists():
        try:
            record = RunRecord.read(folder / "record.json")
        except ValueError as error:
            return Run(name=folder.name, strategy=None, state="failed", error=str(error))
        # A record is written before the run has ended: a run that then failed has both.
        state, error_text = status.get("state") or "completed", status.get("error")
        return Run(name=record.name, strategy=record.strategy, state=state, error=error_text, record=record)
    name = status.get("name") or folder.name
    return Run(
        name=name, strategy=status.get("strategy"), state=status.get("state") or "lost", error=status.get("error")
    )


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


def _read_status(path: Path) -> dict[str, str | None]:
    if not path.exists():
        return {}
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {"state": "failed", "error": f"{path} is damaged: {error}"}
    return {key: status.get(key) for key in ("name", "strategy", "state", "error")}
