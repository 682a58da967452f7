"""A checkpoint on disk: what is in it, which one is whole, and how one comes to be. Pure Python.

A checkpoint is a folder: `<rank>.safetensors` with the pieces that each rank wrote, and `checkpoint.json`, which says
of every tensor, by its full name, which box of it lies in which file. The same for every strategy, so that any can be
resumed under any other. No file of it can run code when it is read.

It is made under another name and renamed when all of it is on the disk: a folder called `step-<n>` is whole, unless the
disk has damaged it since, which the digests tell.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain
from pathlib import Path
from random import SystemRandom
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from strategies.boxes import Box
from strategies.durable import flush, write_whole
from strategies.headers import ITEM_BYTES, Count, Counts, as_filed, read_header, read_json, reason

MANIFEST = "checkpoint.json"
VERSION: Final = 1
PARTIAL, REPLACED, DAMAGED = ".partial", ".replaced", ".damaged"
AVERAGE = "weight_average"  # key of an optimizer's state under which a moving average of the weight lies
VAL_LOSSES = "val_losses.json"
LOSSES = TypeAdapter(dict[int, float])
BLOCK_BYTES = 2**20
MANIFEST_BYTES = 2**28  # more than a million pieces: 2,400 tensors of a 70B model on 512 ranks have as many
PRIME = 2**61 - 1


def plain_name(name: str) -> str:
    """ValueError for the name of a file that might lie anywhere but in the checkpoint's folder."""
    if not re.fullmatch(r"\w[\w.-]{0,200}", name):
        raise ValueError(f"{name[:100]!r} is no plain file name")
    return name


def known_dtype(dtype: str) -> str:
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{dtype[:100]!r} is no format of a tensor's elements")
    return dtype


class UnusableError(ValueError):
    """A checkpoint that may be whole, and yet cannot be used here: of another version, or not to be read."""


Numbers = Annotated[Counts, BeforeValidator(tuple)]
FileName = Annotated[str, AfterValidator(plain_name)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(Strict):
    """One box of a tensor, and where it lies."""

    file: FileName
    key: str
    start: Numbers
    stop: Numbers

    @property
    def box(self) -> Box:
        return Box(self.start, self.stop)


class Stored(Strict):
    """One tensor."""

    shape: Numbers
    dtype: Annotated[str, AfterValidator(known_dtype)]
    pieces: list[Piece]

    @model_validator(mode="after")
    def pieces_lie_inside(self) -> Self:
        for piece in self.pieces:
            sizes = len(piece.start), len(piece.stop)
            if sizes != (len(self.shape),) * 2 or not all(
                start <= stop <= size for start, stop, size in zip(piece.start, piece.stop, self.shape, strict=True)
            ):
                raise ValueError(f"a piece from {piece.start} to {piece.stop} is none of shape {self.shape}")
        return self


class File(Strict):
    size: Count
    sha256: str


class Part(Strict):
    """What one rank wrote: its file, and the tensors that have boxes in it."""

    name: str
    file: File
    tensors: dict[str, Stored]


class LossScale(Strict):
    """By what a run in float16 multiplies its loss, and how many steps have gone well since that changed."""

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: Annotated[int, Field(ge=0)]


class Manifest(Strict):
    """checkpoint.json."""

    # As Python's own JSON has it: the best loss so far is infinite before there is one.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    version: Literal[1] = VERSION
    step: Annotated[int, Field(ge=0)]  # optimizer steps that lie behind it
    strategy: str
    mesh: dict[str, int]
    trained: dict[str, Any]  # what a run that goes on must have in common with this one, by dotted keys
    schedulers: list[dict[str, Any]]
    groups: list[dict[str, Any]] = []  # by group of the optimizer, what it has counted there
    loss_scale: LossScale | None = None  # of a run in float16
    callbacks: dict[str, Any] = {}  # by their `state_key`, what the user's callbacks keep
    files: dict[FileName, File]
    tensors: dict[str, Stored]

    @model_validator(mode="after")
    def pieces_make_up_tensors(self) -> Self:
        for name, stored in self.tensors.items():
            strange = [piece.file for piece in stored.pieces if piece.file not in self.files]
            if strange:
                raise ValueError(f"{name[:100]!r} lies in {strange[0]!r}, which is none of its files")
            if not tiles([piece.box for piece in stored.pieces], stored.shape):
                raise ValueError(f"the pieces of {name[:100]!r} are not all of it, each element once")
        return self

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """ValueError in one line if the folder's checkpoint.json is absent or damaged; UnusableError if it cannot be
        read, or is of another version."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MANIFEST_BYTES:
                raise ValueError(f"it has more than {MANIFEST_BYTES} bytes")
            tree = read_json(path.read_bytes())
            if isinstance(tree, dict) and tree.get("version", VERSION) != VERSION:
                told = f"{path} is of version {str(tree['version'])[:100]}, this Concord reads version {VERSION}"
                raise UnusableError(f"{told}; use the Concord that wrote it, or choose another checkpoint.")
            return cls.model_validate(tree)
        except FileNotFoundError:
            raise ValueError(f"{folder} is no checkpoint: it has no {MANIFEST}.") from None
        except OSError as error:
            raise unreadable(path, error) from None
        except UnusableError:
            raise
        except ValueError as error:
            told = reason(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged ({told}); choose another checkpoint.") from None

    def check(self, folder: Path) -> None:
        """ValueError naming the first file that is missing, or holds other bytes than were written; UnusableError if
        one cannot be read."""
        pieces: dict[str, list[tuple[str, Stored, Piece]]] = {name: [] for name in self.files}
        for name, stored in self.tensors.items():
            for piece in stored.pieces:
                pieces[piece.file].append((name, stored, piece))
        with ThreadPoolExecutor() as pool:
            for found in [pool.submit(check_file, folder / name, file) for name, file in self.files.items()]:
                found.result()
        for file, inside in pieces.items():
            check_pieces(folder / file, inside)


def check_file(path: Path, file: File) -> None:
    try:
        if not path.is_file():
            raise ValueError(f"{path} is missing; choose another checkpoint.")
        size, found = path.stat().st_size, digest(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if size != file.size:
        difference = f"it has {size} bytes, {file.size} were written"
        raise ValueError(f"{path} is damaged: {difference}; choose another checkpoint.")
    if found != file.sha256:
        raise ValueError(f"{path} is damaged: it holds other bytes than were written; choose another checkpoint.")


def unreadable(path: Path, error: OSError) -> UnusableError:
    return UnusableError(f"{path} cannot be read ({error.strerror}); mend that, or choose another checkpoint.")


def check_pieces(path: Path, pieces: Sequence[tuple[str, Stored, Piece]]) -> None:
    """ValueError unless a file has in it what the manifest says lies there."""
    header = read_header(path)
    for name, stored, piece in pieces:
        entry = header.get(piece.key)
        if entry is None or (entry.torch_dtype, entry.shape) != as_filed(stored.dtype, piece.box.shape):
            raise ValueError(f"{path} is damaged: it has no such piece of {name[:100]!r}; choose another checkpoint.")


def tiles(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether boxes inside of a shape make up all of it, each element once; in time that grows with their number alone.

    Each dim is stretched at random, and volumes are compared: elements that are there twice or not at all would have to
    cancel by chance, which has a probability of dims / PRIME (Schwartz 1980, lemma 1).
    """
    draw = SystemRandom()  # the run's own generators are not touched, and nobody can know the numbers beforehand
    marks: dict[tuple[int, int], int] = {}

    def volume(box: Box) -> int:
        result = 1
        for dim, (start, stop) in enumerate(zip(box.start, box.stop, strict=True)):
            first, last = (marks.setdefault((dim, edge), draw.randrange(PRIME)) for edge in (start, stop))
            result = result * (last - first) % PRIME
        return result

    return sum(map(volume, boxes)) % PRIME == volume(Box.whole(shape)) % PRIME


def digest(path: Path) -> str:
    made = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            made.update(block)
    return made.hexdigest()


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were finished, oldest first; OSError where they cannot be seen."""
    try:
        found = list((run_dir / "checkpoints").iterdir())  # glob takes what it may not read to be empty
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def stranded(run_dir: Path) -> list[Path]:
    """Checkpoints that were to be replaced by another of their step when the run was killed: they are whole, too."""
    found = (run_dir / "checkpoints").glob(f"step-*{REPLACED}")
    return [path for path in found if not path.with_name(path.name.removesuffix(REPLACED)).exists()]


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, in a folder that is only to be read."""
    return max([*checkpoints(run_dir), *stranded(run_dir)], default=None)


def unfinished(folder: Path) -> Path:
    """The folder that a checkpoint is written in until `finish` gives it its name."""
    return folder.with_name(folder.name + PARTIAL)


def begin(folder: Path) -> Path:
    """Make the folder that a checkpoint is written in; any rank may come first."""
    partial = unfinished(folder)
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def finish(folder: Path, manifest: Manifest) -> None:
    """Name what `begin` has begun, whose files are on the disk: from here on it is a checkpoint."""
    partial = unfinished(folder)
    path = partial / MANIFEST
    path.write_text(manifest.model_dump_json())
    flush(path)
    flush(partial)
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():  # an earlier one of the same step
        folder.rename(replaced)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def merged(parts: Iterable[Part]) -> dict[str, Stored]:
    """The tensors that all ranks have written, each box once; ValueError (a bug of the engine) if one is not whole."""
    tensors: dict[str, Stored] = {}
    pieces: dict[str, dict[Box, Piece]] = defaultdict(dict)
    for part in parts:
        for name, stored in part.tensors.items():
            so_far = tensors.setdefault(name, stored)
            if (so_far.shape, so_far.dtype) != (stored.shape, stored.dtype):
                raise ValueError(f"{name} is {so_far.shape} {so_far.dtype} on one rank, {stored.shape} on another.")
            for piece in stored.pieces:
                pieces[name].setdefault(piece.box, piece)
    for name, stored in tensors.items():
        held = sum(box.numel for box in pieces[name])
        if held != Box.whole(stored.shape).numel:
            raise ValueError(f"of {name}, {held} of {Box.whole(stored.shape).numel} elements were written.")
    return {name: one.model_copy(update={"pieces": [*pieces[name].values()]}) for name, one in tensors.items()}


def val_losses(run_dir: Path) -> dict[int, float]:
    """Validation losses by optimizer step, of the steps that were validated and might be kept for it."""
    path = run_dir / "checkpoints" / VAL_LOSSES
    try:
        return LOSSES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError:
        told = f"{path} is damaged; going on as if it were not there."
        print(told, file=sys.stderr)  # noqa: T201  # the next validation writes it anew
        return {}


def note_val_loss(run_dir: Path, step: int, loss: float) -> None:
    write_val_losses(run_dir, {**val_losses(run_dir), step: loss})


def write_val_losses(run_dir: Path, losses: Mapping[int, float]) -> None:
    path = run_dir / "checkpoints" / VAL_LOSSES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(losses))


def best_steps(losses: Mapping[int, float], count: int) -> list[int]:
    """The steps of the lowest losses, lowest first; of equal ones the earlier."""
    return sorted(losses, key=lambda step: (losses[step], step))[:count]


def sweep(run_dir: Path, *, keep_last: int, keep_best: int = 0) -> None:
    """Remove the checkpoints that are neither among the newest nor among the best."""
    found = checkpoints(run_dir)
    # A step that is yet to be saved takes nobody's place.
    losses = {step: loss for step, loss in val_losses(run_dir).items() if folder_of(run_dir, step) in found}
    best = {folder_of(run_dir, step) for step in best_steps(losses, keep_best)}
    for folder in found[:-keep_last]:
        if folder not in best:
            shutil.rmtree(folder, ignore_errors=True)


def recover(run_dir: Path) -> None:
    """Give its name back to a checkpoint that was to be replaced when the run was killed."""
    for replaced in stranded(run_dir):
        replaced.rename(replaced.with_name(replaced.name.removesuffix(REPLACED)))


def clear(run_dir: Path, step: int) -> None:
    """Prepare the folder for a run that starts at `step`: only checkpoints of its own history are found there then.

    For when nobody writes one. What was never finished is removed. Checkpoints of later steps, which were passed over
    because they are damaged, are called so.
    """
    for left in chain.from_iterable((run_dir / "checkpoints").glob(f"*{end}") for end in (PARTIAL, REPLACED)):
        shutil.rmtree(left, ignore_errors=True)
    losses = val_losses(run_dir)
    if any(later > step for later in losses):
        write_val_losses(run_dir, {earlier: loss for earlier, loss in losses.items() if earlier <= step})
    for folder in checkpoints(run_dir):
        if folder > folder_of(run_dir, step):
            damaged = folder.with_name(folder.name + DAMAGED)
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
