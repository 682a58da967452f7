"""What earlier attempts at a run have left in its folder: moved aside, given back, and read where it can be."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launch.alive import LOCK
from tracking.status import RunStatus, read_status

# Of an earlier attempt, what the next one goes on with, or does not touch.
KEPT = ("attempts", "checkpoints", "wandb", ".claim", LOCK)


def pending(run_dir: Path) -> Path:
    """Where the files of the attempt before lie until the next one is prepared."""
    return run_dir / "attempts" / "pending"


def set_attempt_aside(run_dir: Path) -> None:
    """Move all that the attempt before has left, but its checkpoints, aside; nothing is deleted."""
    left = [path for path in run_dir.iterdir() if path.name not in KEPT]
    if left:
        pending(run_dir).mkdir(parents=True)
    for path in left:
        path.rename(pending(run_dir) / path.name)


def number_attempt(run_dir: Path) -> None:
    """Let what was set aside be attempts/<n>: the next attempt goes."""
    attempts = run_dir / "attempts"
    numbers = [int(path.name) for path in attempts.iterdir() if path.name.isdecimal()]
    pending(run_dir).rename(attempts / str(1 + max(numbers, default=0)))


def give_attempt_back(run_dir: Path) -> None:
    """Undo `set_attempt_aside` for an attempt that never began; wherever one of both was killed, too."""
    for path in pending(run_dir).iterdir():
        place = run_dir / path.name
        if place.is_dir():
            shutil.rmtree(place)  # the empty ranks/ of the one that never began
        path.replace(place)
    pending(run_dir).rmdir()


def earlier_status(run_dir: Path) -> RunStatus | None:
    """The status that an attempt has left; None where there is none, or, as is said, one that was cut short."""
    try:
        return read_status(run_dir)
    except (json.JSONDecodeError, UnicodeDecodeError):
        say_damaged(run_dir / "status.json")
        return None


def earlier_tree(folder: Path) -> dict[str, Any] | None:
    """The resolved.yaml that an attempt has left; None where there is none, or, as is said, one that was cut short."""
    path = folder / "resolved.yaml"
    try:
        tree = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        say_damaged(path)
        return None
    return tree


def earlier_trees(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The configs of all attempts that have begun, newest first."""
    numbered = [path for path in (run_dir / "attempts").glob("*") if path.name.isdecimal()]
    for folder in (run_dir, pending(run_dir), *sorted(numbered, key=lambda path: -int(path.name))):
        if (tree := earlier_tree(folder)) is not None:
            yield tree


def say_damaged(path: Path) -> None:
    print(f"{path} is damaged; going on as if it were not there.", file=sys.stderr)
