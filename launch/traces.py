"""Folders that are made for a run: of one that is refused none is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def missing(folder: Path) -> list[Path]:
    """A folder and those above it, of which making it will make each; innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first in which there is something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def leave_nothing(run_dir: Path) -> None:
    """Remove what a claim has written into the folder of a run that never began."""
    for name in ("status.json", ".claim", ".alive"):
        with suppress(OSError):
            (run_dir / name).unlink()


def in_sweep(run_dir: Path) -> bool:
    """Whether a run is one of a sweep's jobs, whose table says what became of each."""
    return (run_dir.parent / "multirun.yaml").is_file()
