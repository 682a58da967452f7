"""Files that a loss of power leaves whole, as they are or as they were. Pure Python."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, have the disk hold it, and only then give it its own.

    Without that, a file system may keep the new name and lose the bytes.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    flush(aside)
    aside.replace(path)


def flush(path: Path) -> None:
    """Have the disk itself hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
