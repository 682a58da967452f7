"""Runs out of W&B, as local folders give them: those of a group by its API, and those that offline runs have left."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from wandb.apis.public import Run as RunOnServer

from tracking.history import History, history_of
from tracking.redact import redact
from tracking.sources import Run, read_run
from tracking.wandb_config import AXES, COMPARE, RUN_FILES, Group
from tracking.wandb_run import TROUBLE, be_quiet, close_service, first_line, has_api_key

REQUEST_TIMEOUT_S = 10  # W&B asks again and again as long
# W&B's history is JSON, which has no other words for these.
NOT_FINITE = ("NaN", "Infinity", "-Infinity")
# Where runs lie below a folder: its own, a folder wandb/, that of a run, that of a sweep.
PLACES = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb", "*/wandb/*run-*/*.wandb")


def read_group(source: str) -> dict[str, Run]:
    """The runs of `wandb:entity/project/group`, by their paths on the server, in the order in which they began.

    Raises ValueError in one line for what is malformed, not there or not reachable.
    """
    entity, project, group = Group.parse(source)
    be_quiet()
    if not has_api_key():
        host = redact(wandb.setup().settings.base_url)
        raise ValueError(f"{source}: no API key for {host}; `wandb login` stores one, or set WANDB_API_KEY.")
    try:
        found = wandb.Api(timeout=REQUEST_TIMEOUT_S).runs(f"{entity}/{project}", {"group": group}, per_page=100)
        runs = {"/".join(one.path): _of_server(one) for one in found if one.job_type != COMPARE}
    except (*TROUBLE, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {_why(error)}") from None
    finally:
        close_service()
    if not runs:
        raise ValueError(f"{source} holds no run; see the group's name in W&B, or logger.group in resolved.yaml.")
    return runs


def read_offline(folder: Path) -> dict[str, Run]:
    """The runs that W&B has left below `folder`, by where they lie; none where there are none."""
    files = sorted(file for place in PLACES for file in folder.glob(place))
    runs = {str(file.resolve()): _of_file(file) for file in files}
    return {path: run for path, run in runs.items() if run is not None}


def _why(error: BaseException) -> str:
    """W&B's own reason, but where it speaks of itself instead of the server."""
    if "verify credentials" not in str(error):
        return first_line(error)
    host = redact(wandb.setup().settings.base_url)
    return f"{host} does not answer, or does not take the key; see WANDB_BASE_URL and `wandb login`."


def _of_server(run: RunOnServer) -> Run:
    history = logged(run.scan_history(use_cache=False))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, run.id)
        for file in run.files(names=list(RUN_FILES)):
            file.download(root=str(folder)).close()
        return _run(folder, name=run.name or run.id, strategy=run.job_type, state=run.state, history=history)


def _of_file(path: Path) -> Run | None:
    """The run in W&B's own file, read by W&B's own reader; None where it only holds a comparison."""
    entries = inspect(path)
    made: dict[str, Any] = next((entry["run"] for entry in entries if entry["type"] == "run"), {})
    if made.get("job_type") == COMPARE:
        return None
    codes = [entry["exit"].get("exit_code", 0) for entry in entries if entry["type"] == "exit"]
    state = ("failed" if codes[-1] else "finished") if codes else "lost"
    history = logged(entry["history"]["item"] for entry in entries if entry["type"] == "history")
    name = made.get("display_name") or path.parent.name
    read = _run(path.parent / "files", name=name, strategy=made.get("job_type"), state=state, history=history)
    return dataclasses.replace(read, folder=path.parent)


def inspect(path: Path) -> list[dict[str, Any]]:
    """Every entry of a .wandb file.

    Raises ValueError when it cannot be read.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{path} cannot be read: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def logged(rows: Iterable[Mapping[str, Any]]) -> History:
    """Columns as metrics.csv has them: numbers alone, without what W&B and its logger add."""
    return history_of(_numbers(row) for row in rows if "step" in row)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if (isinstance(value, int | float) or value in NOT_FINITE) and not key.startswith("_") and key not in AXES[1:]
    }


def _run(folder: Path, *, name: str, strategy: str | None, state: str, history: History) -> Run:
    """The run whose files lie in `folder`; what W&B knows of it where its record is not among them."""
    read = dataclasses.replace(read_run(folder), folder=None, history=history)
    if read.record is not None:
        return read
    error = read.error if (folder / "record.json").exists() else "W&B has no record.json of it"
    return dataclasses.replace(read, name=name, strategy=strategy, state=state, error=error)
