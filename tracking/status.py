"""status.json: what became of a run, written by its dispatcher and readable at any time."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from strategies.durable import write_whole

State = Literal["running", "completed", "failed", "refused", "interrupted", "lost"]


class RunStatus(BaseModel):
    """State of one run; `lost` is a run whose dispatcher vanished without a last word."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    strategy: str | None
    state: State
    error: str | None = None
    exit_code: int | None = None
    started: float  # seconds since the epoch
    wall_s: float | None = None
    dispatcher: tuple[str, int, float] | None = None  # host, pid, and start time of the process that runs it
    beat_s: float | None = None  # how often that process touches the file as long as it runs; None: it does not

    def write(self, run_dir: Path) -> None:
        write_whole(run_dir / "status.json", self.model_dump_json(indent=2))


def read_status(run_dir: Path) -> RunStatus | None:
    """The run's status, with `running` turned to `lost` when nobody runs it any more; None where no run was."""
    path = run_dir / "status.json"
    if not path.exists():
        return None
    status = RunStatus.model_validate(json.loads(path.read_text()))
    if status.state == "running" and not dispatcher_lives(status):
        return status.model_copy(update={"state": "lost", "error": "its dispatcher ended without a last word"})
    return status


def dispatcher_lives(status: RunStatus) -> bool:
    """Whether the process that runs it still does; from another host, where that cannot be seen, it is believed."""
    if status.dispatcher is None:
        return False
    host, pid, started = status.dispatcher
    if host != socket.gethostname():
        return True
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(name: str, strategy: str | None, *, beat_s: float | None = None) -> RunStatus:
    """A run that this process has just begun to dispatch."""
    me = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
    return RunStatus(name=name, strategy=strategy, state="running", started=time.time(), dispatcher=me, beat_s=beat_s)


def ended(status: RunStatus, state: State, *, error: str | None = None, exit_code: int = 0) -> RunStatus:
    wall_s = round(time.time() - status.started, 3)
    return status.model_copy(update={"state": state, "error": error, "exit_code": exit_code, "wall_s": wall_s})
