"""Writes and reads what a rank holds of a model and its optimizer, whatever the strategy spread them by."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.boxes import Box
from strategies.checkpoint import (
    AVERAGE,
    File,
    LossScale,
    Manifest,
    Part,
    Piece,
    Stored,
    begin,
    finish,
    merged,
    unfinished,
)
from strategies.engines.groups import Moment
from strategies.engines.probing import ready_to_step
from strategies.headers import DTYPES, PAIRED

CODES: dict[torch.dtype, str] = {getattr(torch, name): code for code, (name, _) in DTYPES.items()}
KNOWN = {*CODES, torch.complex128}

POLL_S = 0.02  # how often the first rank looks whether another has written its part
PROGRESS_S = 0.1  # how often who waits for a checkpoint looks whether more of it has been written
SETTLE_S = 10.0  # a disk that writes nothing for so long is full or gone, or the one who wrote is

Select = Callable[[Tensor], Sequence[Tensor]]


def all_of_it(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What this rank holds of one parameter or buffer.

    stepped: the tensor that the optimizer steps, or a buffer; the optimizer's state for it has the same layout.
    select: views of `boxes` in anything of that layout.
    writes: whether it is for this rank, of all that hold the same, to write it.
    """

    name: str  # FQN in the module
    shape: tuple[int, ...]  # of the whole
    boxes: Sequence[Box]
    stepped: Tensor
    select: Select = all_of_it
    writes: bool = True
    has_state: bool = True  # whether what the optimizer keeps is of this parameter, and not of others beside it

    @property
    def is_whole(self) -> bool:
        """Whether nobody else has a part of it that is stepped, or kept of."""
        return self.stepped.shape == self.shape and list(self.boxes) == [Box.whole(self.shape)]

    @classmethod
    def whole(cls, name: str, tensor: Tensor, *, writes: bool) -> Held:
        shape = tuple(tensor.shape)
        return cls(name=name, shape=shape, boxes=[Box.whole(shape)], stepped=tensor, writes=writes)


class Holds(Protocol):
    """What an engine must show for its run to be saved and resumed."""

    @property
    def stepping(self) -> Optimizer:
        """The optimizer that steps this rank's tensors, and keeps state for them."""
        ...

    def held(self) -> Iterator[Held]:
        """This rank's part of every parameter and persistent buffer."""
        ...

    def narrow(self) -> None:
        """Make computing copies of what has been loaded into the stepped weights."""
        ...

    def restored(self, without_state: frozenset[str]) -> None:
        """Take note of the parameters that the run which wrote the checkpoint had never stepped."""
        ...

    scaling: LossScale | None
    """Where the loss scale of a run in float16 stands; None of any other."""


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict would hold."""
    saved = module.state_dict().keys()
    return ((fqn, buffer) for fqn, buffer in module.named_buffers() if fqn in saved)


Named = tuple[str, tuple[int, ...], Box, Tensor]


def tensors_of(held: Held, optimizer: Optimizer) -> Iterator[Named]:
    """Name, shape of the whole, box and tensor of a parameter's weight and of all that the optimizer keeps for it."""
    for box, part in zip(held.boxes, held.select(held.stepped), strict=True):
        yield f"weight/{held.name}", held.shape, box, part
    for key, value in (optimizer.state.get(held.stepped, {}) if held.has_state else {}).items():
        name = f"state/{key}/{held.name}"
        kept = number(value)
        if kept is None or kept.dtype not in KNOWN:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {type(value).__name__} {key} for {held.name}, and only tensors and "
                f"numbers can be saved"
            )
        if kept.shape == held.stepped.shape:
            for box, part in zip(held.boxes, held.select(kept), strict=True):
                yield name, held.shape, box, part
        elif kept.dim() == 0 or held.is_whole:  # a count of steps, say: the same on all ranks
            yield name, tuple(kept.shape), Box.whole(kept.shape), kept
        else:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} in shape {tuple(kept.shape)} for a rank's part of "
                f"{held.name}, and what is kept of a part has to have its shape to be saved"
            )


def number(value: Any) -> Tensor | None:
    """What an optimizer keeps as a tensor; None of what is no number, or one of more than 64 bits."""
    match value:
        case Tensor():
            return value
        case bool():
            return torch.tensor(value)
        case float():
            return torch.tensor(value, dtype=torch.float64)
        case int():
            return torch.tensor(value, dtype=torch.int64) if -(2**63) <= value < 2**63 else None
    return None


def nothing() -> None:
    """For whom nobody waits."""


def write_rank(folder: Path, rank: int, named: Iterable[Named], gets_on: Callable[[], None] = nothing) -> Part:
    """Write this rank's tensors to a file of its own in an unfinished checkpoint; `gets_on` is called before each."""
    file = f"{rank}.safetensors"
    tensors: dict[str, Stored] = {}
    parts: list[Tensor] = []
    for name, shape, box, part in named:
        piece = Piece(file=file, key=str(len(parts)), start=box.start, stop=box.stop)
        so_far = tensors[name].pieces if name in tensors else []
        dtype = str(part.dtype).removeprefix("torch.")
        tensors[name] = Stored(shape=shape, dtype=dtype, pieces=[*so_far, piece])
        parts.append(torch.view_as_real(part.resolve_conj()) if part.dtype == torch.complex128 else part)
    return Part(name=file, file=write_file(folder / file, parts, gets_on), tensors=tensors)


def write_file(path: Path, tensors: Sequence[Tensor], gets_on: Callable[[], None] = nothing) -> File:
    """Write tensors to a safetensors file, called by their numbers; `gets_on` is called before each."""

    def one_by_one() -> Iterator[Tensor]:
        for tensor in tensors:
            gets_on()
            yield tensor

    return write_tensors(path, {str(key): (one.dtype, one.shape) for key, one in enumerate(tensors)}, one_by_one())


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> File:
    """Write a safetensors file; of tensors that are made when they are asked for, one at a time is in (host) memory.

    layout: format and shape of each, in their order. The format of the file: length of the header in 8 bytes, the
    header as JSON, the tensors' bytes (https://huggingface.co/docs/safetensors/index#format).
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    hashed = sha256()
    with path.open("wb") as file:
        blocks: Iterator[Any] = chain([len(text).to_bytes(8, "little"), text], map(bytes_of, tensors))
        for block in blocks:
            file.write(block)
            hashed.update(block)
            del block  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
    return File(size=8 + len(text) + end, sha256=hashed.hexdigest())


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's elements as they lie in (host) memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy()


Fill = Callable[[dict[str, File], dict[str, Stored]], Manifest]


class Writer:
    """Writes this rank's part of a run's checkpoints; the first rank makes one checkpoint of all parts.

    Ranks tell each other what they wrote through the folder, which they share: nothing here is a collective.

    asynchronous: tensors are copied to host memory, and written while training goes on; else they are written at once,
    and no more than one is ever copied.
    after: called on the first rank when a checkpoint is finished.
    gets_on: called while there is nothing but to wait, as often as more of a checkpoint has been written, by any rank.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        asynchronous: bool,
        after: Callable[[], None] = nothing,
        gets_on: Callable[[], None] = nothing,
    ) -> None:
        self.rank, self.world_size, self.asynchronous, self.after = rank, world_size, asynchronous, after
        self.gets_on = gets_on
        self.copies = Copies()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.folder: Path | None = None  # of the checkpoint that was begun last
        self.under_way: Future[None] | None = None

    def save(self, folder: Path, named: Iterable[Named], manifest: Fill) -> None:
        """Begin a checkpoint, when the one before is finished; `manifest` is what the first rank says of it."""
        self.wait()
        self.folder = folder
        if self.asynchronous:
            self.under_way = self.pool.submit(self.write, folder, self.copies.of(named), manifest)
        else:
            self.write(folder, named, manifest)

    @property
    def is_over(self) -> bool:
        """Whether what was begun is a checkpoint, or cannot become one."""
        if self.under_way is None or self.folder is None:
            return True
        done = self.under_way.done()
        return done and (self.under_way.exception() is not None or self.folder.exists())

    def wait(self) -> None:
        """Until what was begun is on the disk, of all ranks; ValueError if this one's part could not be written."""
        written = None
        while not self.is_over:
            written = self.tell(written)
            time.sleep(PROGRESS_S)
        self.check()
        self.under_way = None

    def settle(self) -> None:
        """As `wait`, but no longer than SETTLE_S after anything more has been written: for a run that fails.

        Ranks that wait for one that has failed still write: their threads need no other rank.
        """
        written, since = None, time.monotonic()
        while not self.is_over and time.monotonic() - since < SETTLE_S:
            before, written = written, self.tell(written)
            since = since if written == before else time.monotonic()
            time.sleep(PROGRESS_S)

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        if self.under_way is not None and self.under_way.done():
            self.under_way.result()

    def tell(self, before: int | None) -> int:
        """The bytes that are written so far of what was begun, by all ranks; tells of them if they are not `before`."""
        assert self.folder is not None
        written = 0
        with suppress(OSError):  # gone in between: it is finished
            written = sum(path.stat().st_size for path in unfinished(self.folder).iterdir())
        if written != before:
            self.gets_on()
        return written

    def write(self, folder: Path, named: Iterable[Named], manifest: Fill) -> None:
        try:
            self.write_part(folder, named)
            if self.rank == 0:
                parts = [self.read_part(unfinished(folder) / f"{rank}.json") for rank in range(self.world_size)]
                finish(folder, manifest({part.name: part.file for part in parts}, merged(parts)))
                self.after()
        except OSError as error:
            # So that there is room for what is said of it; what other ranks have written is theirs.
            (unfinished(folder) / f"{self.rank}.safetensors").unlink(missing_ok=True)
            raise ValueError(
                f"checkpoint: {folder} cannot be written ({error.strerror}); free some space, then go on from the one "
                f"before by the same command with resume=auto."
            ) from error

    def write_part(self, folder: Path, named: Iterable[Named]) -> None:
        partial = begin(folder)
        part = write_rank(partial, self.rank, named, nothing if self.asynchronous else self.gets_on)
        aside = partial / f"{self.rank}.word"
        aside.write_text(part.model_dump_json())
        aside.rename(partial / f"{self.rank}.json")  # nobody reads half a word

    def read_part(self, word: Path) -> Part:
        """What another rank wrote, as soon as it has."""
        written, told = None, time.monotonic()
        while not word.exists():
            time.sleep(POLL_S)
            if not self.asynchronous and time.monotonic() - told > PROGRESS_S:  # else it is not this that anyone awaits
                written, told = self.tell(written), time.monotonic()
        part = Part.model_validate(json.loads(word.read_text()))
        word.unlink()
        return part


class Copies:
    """Copies of tensors in host memory, which is kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, Box], Tensor] = {}

    def of(self, named: Iterable[Named]) -> list[Named]:
        result: list[Named] = []
        for name, shape, box, part in named:
            buffer = self.buffers.get((name, box))
            if buffer is None:
                # Page-locked, a device copies into it while others follow.
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self.buffers[name, box] = buffer
            buffer.copy_(part.detach(), non_blocking=True)
            result.append((name, shape, box, buffer))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result


class Reader:
    """Reads boxes of a checkpoint's tensors from whichever files they lie in."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.files: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def read(self, name: str, box: Box) -> Tensor:
        """ValueError if the checkpoint does not have all of that box."""
        stored = self.manifest.tensors[name]
        result = torch.empty(box.shape, dtype=getattr(torch, stored.dtype))
        count = 0
        for piece in stored.pieces:
            common = box.overlap(piece.box)
            if common is not None:
                part = self.open(piece.file).get_slice(piece.key)[common.inside(piece.box)]
                result[common.inside(box)] = torch.view_as_complex(part) if stored.dtype in PAIRED else part
                count += common.numel
        if count != box.numel:
            raise ValueError(f"{self.folder}: of {name} it has {count} of the {box.numel} elements that are needed.")
        return result

    def open(self, file: str) -> Any:
        if file not in self.files:
            self.files[file] = self.stack.enter_context(safe_open(self.folder / file, framework="pt"))
        return self.files[file]


def make_state(optimizer: Optimizer, stepped: list[Tensor]) -> None:
    """Have an optimizer make the state that it has after a first step, without stepping anything.

    A step by gradients of zeros at a rate of 0, as torch.distributed.checkpoint does it. What the optimizer counts in
    its groups, and of itself, is put back.
    """
    groups, attributes = [Moment(group) for group in optimizer.param_groups], dict(vars(optimizer))
    gradients = [tensor.grad for tensor in stepped]  # DeepSpeed's offload keeps its buffers there
    for group in optimizer.param_groups:
        group.update(params=[], lr=0.0)
    optimizer.param_groups[0]["params"] = stepped
    for tensor in stepped:
        tensor.grad = torch.zeros_like(tensor)
    ready_to_step(optimizer)
    optimizer.step()
    for tensor, gradient in zip(stepped, gradients, strict=True):
        tensor.grad = gradient
    vars(optimizer).clear()
    vars(optimizer).update(attributes)
    for moment in groups:
        moment.put_back()


def load(reader: Reader, held: Iterable[Held], optimizer: Optimizer) -> frozenset[str]:
    """Fill what this rank holds from a checkpoint; ValueError if that is of another model or optimizer.

    Returns the names of what it holds and of which an optimizer that keeps something had nothing: never stepped.
    """
    known, held = reader.manifest.tensors, list(held)
    stepped = {name.split("/", 2)[2] for name in known if name.startswith("state/")}
    fresh = [one.stepped for one in held if one.name in stepped and not optimizer.state.get(one.stepped)]
    make_state(optimizer, list({id(tensor): tensor for tensor in fresh}.values()))
    # Of what this rank holds: what is kept of a parameter may depend on its shape.
    mine = {one.name for one in held} & stepped
    kept = {name.split("/")[1] for name in known if name.startswith("state/") and name.split("/", 2)[2] in mine}
    own = {key for one in held if one.name in mine for key in optimizer.state.get(one.stepped, {})}
    if not stepped:
        own |= {key for one in held for key in optimizer.state.get(one.stepped, {})} | lazily_kept(optimizer, held)
    # An average of weights is no optimizer's own: one that is begun here, or ended, changes nothing else.
    own, kept = own - {AVERAGE}, kept - {AVERAGE}
    if own != kept and (stepped or not may_have_skipped_all(reader.manifest)):
        raise ValueError(
            f"resume={reader.folder}: its optimizer kept {', '.join(sorted(kept)) or 'nothing'}, and "
            f"{type(optimizer).__name__} keeps {', '.join(sorted(own)) or 'nothing'}; choose the optimizer that wrote "
            f"it."
        )
    with torch.no_grad():
        for one in held:
            fill(reader, one, optimizer)
    return frozenset(one.name for one in held if stepped and one.name not in stepped)


def fill(reader: Reader, one: Held, optimizer: Optimizer) -> None:
    """Put into one parameter or buffer, and what the optimizer keeps of it, what a checkpoint has of them."""
    known = reader.manifest.tensors
    weight = known.get(f"weight/{one.name}")
    if weight is None or weight.shape != one.shape:
        raise misfit(reader, f"weight/{one.name}", one.shape)
    copy_boxes(reader, f"weight/{one.name}", one, one.stepped)
    if not one.has_state:
        return
    state = optimizer.state.get(one.stepped, {})
    for key, value in state.items():
        name = f"state/{key}/{one.name}"
        if name not in known:
            continue  # the parameter had no gradient yet: what is kept of it is still zeros
        shape = known[name].shape
        if isinstance(value, Tensor) and value.shape == one.stepped.shape and shape == one.shape:
            copy_boxes(reader, name, one, value)
        elif shape != () and not one.is_whole:
            raise misfit(reader, name, one.shape)
        else:
            whole = reader.read(name, Box.whole(shape))
            if isinstance(value, bool | int | float):
                state[key] = type(value)(whole.item())
            elif isinstance(value, Tensor) and value.shape == shape:
                value.copy_(whole)
            else:  # some are made when there is something to keep
                state[key] = whole.to(one.stepped.device)


def copy_boxes(reader: Reader, name: str, one: Held, tensor: Tensor) -> None:
    for box, part in zip(one.boxes, one.select(tensor), strict=True):
        part.copy_(reader.read(name, box))


def misfit(reader: Reader, name: str, shape: tuple[int, ...]) -> ValueError:
    known = reader.manifest.tensors
    found = f"in shape {known[name].shape}, not {shape}" if name in known else "not at all"
    return ValueError(f"resume={reader.folder}: it has {name} {found}; give the model that wrote it.")


def check_kind(folder: Path, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """ValueError if a checkpoint was written with an optimizer that keeps something else than the one that is made."""
    known = Manifest.read(folder).tensors
    kept = {name.split("/")[1] for name in known if name.startswith("state/")}
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make([weight])
    make_state(optimizer, [weight])
    own = set(optimizer.state.get(weight, {}))
    if kept and own != kept:
        raise ValueError(
            f"resume={folder}: its optimizer kept {', '.join(sorted(kept))}, and {type(optimizer).__name__} keeps "
            f"{', '.join(sorted(own)) or 'nothing'}; choose the optimizer that wrote it."
        )


def lazily_kept(optimizer: Optimizer, held: Iterable[Held]) -> set[str]:
    """What an optimizer keeps for a parameter from its first step on; nothing of it is left."""
    stepping = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    fresh = [one.stepped for one in held if one.stepped in stepping and one.stepped.requires_grad]
    fresh = [tensor for tensor in fresh if not optimizer.state.get(tensor)]
    if not fresh:
        return set()
    smallest = min(fresh, key=Tensor.numel)
    make_state(optimizer, [smallest])
    return set(optimizer.state.pop(smallest, {}))


def may_have_skipped_all(manifest: Manifest) -> bool:
    """Whether no step may have been taken: those of a first, too high loss scale are left out."""
    return manifest.loss_scale is not None and manifest.loss_scale.good_steps == 0


def draws(rank: int, device: torch.device) -> Iterator[Named]:
    """Where this rank's random number generators stand."""
    kind, words, position, has_gauss, gauss = cast(tuple[str, Any, int, int, float], np.random.get_state())
    assert kind == "MT19937"
    version, own, next_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*words.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *own], dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if next_gauss is None else next_gauss, dtype=torch.float64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    for key, tensor in tensors.items():
        yield f"draws/{rank}/{key}", tuple(tensor.shape), Box.whole(tensor.shape), tensor


def load_draws(reader: Reader, rank: int, device: torch.device) -> None:
    """Put the generators back; those of a device only where the checkpoint was written on such a one."""

    def read(key: str) -> Tensor:
        name = f"draws/{rank}/{key}"
        return reader.read(name, Box.whole(reader.manifest.tensors[name].shape))

    torch.set_rng_state(read("torch"))
    *words, position, has_gauss = read("numpy").tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, float(read("numpy_gauss"))))
    version, *own = read("python").tolist()
    gauss = float(read("python_gauss"))
    random.setstate((version, tuple(own), None if math.isnan(gauss) else gauss))
    if device.type == "cuda" and f"draws/{rank}/cuda" in reader.manifest.tensors:
        torch.cuda.set_rng_state(read("cuda"), device)
