"""A checkpoint on disk: what is in it, which one is whole, and how one comes to be. Pure Python.

A checkpoint is a folder: `<rank>.safetensors` with the pieces that each rank wrote, and `checkpoint.json`, which says
of every tensor, by its full name, which box of it lies in which file. The same for every strategy, so that any can be
resumed under any other. No file of it can run code when it is read.

It is made under another name and renamed when all of it is on the disk: a folder called `step-<n>` is whole, unless the
disk has damaged it since, which the digests tell.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from strategies.boxes import Box

MANIFEST = "checkpoint.json"
PARTIAL = ".partial"
BLOCK_BYTES = 2**20

Numbers = Annotated[tuple[int, ...], BeforeValidator(tuple)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(Strict):
    """One box of a tensor, and where it lies."""

    file: str
    key: str
    start: Numbers
    stop: Numbers

    @property
    def box(self) -> Box:
        return Box(self.start, self.stop)


class Stored(Strict):
    """One tensor."""

    shape: Numbers
    dtype: str
    pieces: list[Piece]


class File(Strict):
    size: int
    sha256: str


class Part(Strict):
    """What one rank wrote: its file, and the tensors that have boxes in it."""

    name: str
    file: File
    tensors: dict[str, Stored]


class Manifest(Strict):
    """checkpoint.json."""

    version: Literal[1] = 1
    step: int  # optimizer steps that lie behind it
    strategy: str
    mesh: dict[str, int]
    trained: dict[str, Any]  # what a run that goes on must have in common with this one, by dotted keys
    schedulers: list[dict[str, Any]]
    files: dict[str, File]
    tensors: dict[str, Stored]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """ValueError in one line if the folder's checkpoint.json is absent, cut short, or of another version."""
        path = folder / MANIFEST
        try:
            return cls.model_validate(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(f"{folder} is no checkpoint: it has no {MANIFEST}.") from None
        except (OSError, ValueError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}); choose another checkpoint.") from None

    def check(self, folder: Path) -> None:
        """ValueError naming the first file that is missing, or holds other bytes than were written."""
        for name, file in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; choose another checkpoint.")
            if path.stat().st_size != file.size:
                raise ValueError(
                    f"{path} is damaged: it has {path.stat().st_size} bytes, {file.size} were written; choose another "
                    f"checkpoint."
                )
            if digest(path) != file.sha256:
                raise ValueError(
                    f"{path} is damaged: it holds other bytes than were written; choose another checkpoint."
                )


def digest(path: Path) -> str:
    made = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            made.update(block)
    return made.hexdigest()


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were finished, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if path.is_dir() and re.fullmatch(r"step-\d+", path.name))


def begin(folder: Path) -> Path:
    """An empty folder to write a checkpoint in, until `finish` gives it its name."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish(folder: Path, manifest: Manifest) -> None:
    """Name what `begin` has begun: from here on it is a checkpoint, also if the machine stops."""
    partial = folder.with_name(folder.name + PARTIAL)
    path = partial / MANIFEST
    path.write_text(manifest.model_dump_json())
    for name in (*manifest.files, MANIFEST):
        flush(partial / name)
    flush(partial)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier one of the same step, from before a resume
    partial.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Have the disk itself hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def merged(parts: Mapping[str, Part]) -> dict[str, Stored]:
    """The tensors that all ranks have written, each box once; ValueError (a bug of the engine) if one is not whole."""
    tensors: dict[str, Stored] = {}
    for part in parts.values():
        for name, stored in part.tensors.items():
            so_far = tensors.get(name, stored.model_copy(update={"pieces": []}))
            if (so_far.shape, so_far.dtype) != (stored.shape, stored.dtype):
                raise ValueError(f"{name} is {so_far.shape} {so_far.dtype} on one rank, {stored.shape} on another.")
            known = {piece.box for piece in so_far.pieces}
            fresh = [piece for piece in stored.pieces if piece.box not in known]
            tensors[name] = so_far.model_copy(update={"pieces": [*so_far.pieces, *fresh]})
    for name, stored in tensors.items():
        held = sum(piece.box.numel for piece in stored.pieces)
        if held != Box.whole(stored.shape).numel:
            raise ValueError(f"of {name}, {held} of {Box.whole(stored.shape).numel} elements were written.")
    return tensors


def sweep(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what unfinished ones have left."""
    for partial in (run_dir / "checkpoints").glob(f"*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)
    for folder in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
