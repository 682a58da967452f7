"""Weights in the formats of others: safetensors files and plain state dicts."""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from strategies.boxes import Box
from strategies.checkpoint import MANIFEST, File, Manifest, Stored
from strategies.engines.checkpoint import CODES, Held, Reader, write_tensors
from strategies.fitting import Rename, globs_of, matches_any, prefixes_that_fit, renamed
from strategies.headers import ITEM_BYTES, PAIRED
from strategies.weights import INDEX, Source, manifest_of

# What torch.load says, by its kind, of a file that is no zip of a plain dict of tensors.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
    struct.error,
)  # fmt: skip


def names_of(module: nn.Module) -> dict[str, list[str]]:
    """By the first FQN of each parameter and persistent buffer, all FQNs that it has: a tied one has several."""
    names: dict[int, list[str]] = {}
    for fqn, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), []).append(fqn)
    return {fqns[0]: fqns for fqns in names.values()}


def places(manifest: Manifest, module: nn.Module, may_lack: Sequence[str] = ()) -> dict[str, str]:
    """By the first FQN of each tensor of a module, the name of the same in a checkpoint's weights.

    ValueError, with what to do, naming the first tensor that is missing (and matches none of the globs `may_lack`), of
    another shape, or not the module's.
    """
    names, tensors = names_of(module), module.state_dict(keep_vars=True)
    for glob in may_lack:
        if not any(matches_any(name, [glob]) for fqns in names.values() for name in fqns):
            raise ValueError(f"the model has no tensor {glob}, as model.weights_may_lack has it; correct that")
    found = {
        fqn: [f"weight/{name}" for name in fqns if f"weight/{name}" in manifest.tensors] for fqn, fqns in names.items()
    }
    shapes = {fqn: tuple(tensors[fqn].shape) for fqn in names}
    extra = sorted(manifest.tensors.keys() - {f"weight/{name}" for fqns in names.values() for name in fqns})
    extra = [name.removeprefix("weight/") for name in extra]
    missing = [
        fqn for fqn, known in found.items() if not known and not any(matches_any(name, may_lack) for name in names[fqn])
    ]
    if missing:
        pair = prefixes_that_fit(extra, missing)
        fix = f"set model.weights_rename=[{pair}]" if pair else f"set model.weights_may_lack={globs_of(missing)}"
        raise ValueError(
            f"it has no {missing[0]} ({len(missing)} of the model's {len(names)} tensors are not there); give weights "
            f"of this model, or {fix}{'' if pair else ' if they are to keep their initial values'}"
        )
    wrong = [fqn for fqn in names if found[fqn] and manifest.tensors[found[fqn][0]].shape != shapes[fqn]]
    if wrong:
        there, globs = manifest.tensors[found[wrong[0]][0]].shape, globs_of(wrong)
        raise ValueError(
            f"{wrong[0]} is of shape {there}, not {shapes[wrong[0]]} ({len(wrong)} differ); give weights of this "
            f"model, or set model.weights_ignore={globs} model.weights_may_lack={globs}"
        )
    if extra:
        raise ValueError(
            f"the model has no {extra[0][:100]} ({len(extra)} of its {len(manifest.tensors)} tensors); give weights of "
            f"this model, or set model.weights_ignore={globs_of(extra)} to leave them out"
        )
    return {fqn: known[0] for fqn, known in found.items() if known}


def check_shapes(folder: Path, module: nn.Module) -> None:
    """ValueError naming the first weight of a module that a checkpoint has in another shape, or not at all."""
    known, tensors = Manifest.read(folder).tensors, dict(module.named_parameters(remove_duplicate=False))
    for fqn, fqns in names_of(module).items():
        found = [known[f"weight/{name}"].shape for name in fqns if f"weight/{name}" in known]
        if fqn in tensors and found[:1] != [tuple(tensors[fqn].shape)]:
            told = f"in shape {tuple(found[0])}, not {tuple(tensors[fqn].shape)}" if found else "not at all"
            raise ValueError(
                f"resume={folder}: it has {fqn} {told}; give the model that wrote it: no resume_despite changes that."
            )


def load_weights(reader: Reader, held: Iterable[Held], place: Mapping[str, str]) -> None:
    """Fill what this rank holds with its part of weights that lie at `place`; what has none stays as it is."""
    with torch.no_grad():
        for one in held:
            for box, part in zip(one.boxes, one.select(one.stepped), strict=True):
                if one.name in place:
                    part.copy_(reader.read(place[one.name], box))


def read_whole(reader: Reader, name: str) -> Tensor:
    return reader.read(name, Box.whole(reader.manifest.tensors[name].shape))


def to_safetensors(source: Source, out: Path, rename: Rename, shard_bytes: float | None) -> None:
    """Write whole weights to one file, or to a folder of files of `shard_bytes` (or a tensor) at most, and an index."""
    with Reader(source.folder, source.manifest) as reader:
        names = renamed((name.removeprefix("weight/") for name in source.manifest.tensors), rename, "--rename")
        tensors = {new: source.manifest.tensors[f"weight/{old}"] for new, old in names.items()}
        strange = [name for name, stored in tensors.items() if stored.dtype in PAIRED]
        if strange:
            raise ValueError(
                f"{strange[0]} is of {tensors[strange[0]].dtype}, which safetensors has not; use --to lightning."
            )

        def read(new: str) -> Tensor:
            return read_whole(reader, f"weight/{names[new]}")

        if shard_bytes is None:
            write_plain(out, tensors, read)
            return
        out.mkdir()
        shards = list(packed(tensors, shard_bytes))
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_plain(out / file, shard, read)
            weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(map(size_of, tensors.values()))}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2))


def to_checkpoint(tensors: Mapping[str, Stored], read: Callable[[str], Tensor], out: Path) -> None:
    """Write whole tensors as a checkpoint's weights, with no step and no optimizer behind them."""
    out.mkdir()
    file = write_plain(out / "0.safetensors", tensors, read)
    manifest = manifest_of(out, ["0.safetensors"]).model_copy(update={"files": {"0.safetensors": file}})
    (out / MANIFEST).write_text(manifest.model_dump_json())


def size_of(stored: Stored) -> int:
    return math.prod(stored.shape) * ITEM_BYTES[stored.dtype]


def packed(tensors: Mapping[str, Stored], limit: float) -> Iterator[dict[str, Stored]]:
    """Tensors by name, in groups that have at most `limit` bytes where they are several."""
    group: dict[str, Stored] = {}
    size = 0
    for name, stored in sorted(tensors.items()):
        if group and size + size_of(stored) > limit:
            yield group
            group, size = {}, 0
        group[name] = stored
        size += size_of(stored)
    yield group


def write_plain(path: Path, tensors: Mapping[str, Stored], read: Callable[[str], Tensor]) -> File:
    """Write tensors to a safetensors file under their names; one at a time is in memory."""
    # Those of large elements first, as safetensors itself writes them.
    ordered = sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0]))
    layout = {name: (getattr(torch, stored.dtype), stored.shape) for name, stored in ordered}
    return write_tensors(path, layout, map(read, layout), {"format": "pt"})  # transformers asks for it


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, Lightning's checkpoints too; ValueError if it is anything more.

    Nothing in it can run: torch's own unpickler knows tensors and builtins, and here no compressed parts, which could
    be larger than memory.
    """
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                    raise ValueError("it is compressed")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read, it refuses
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} {unreadable(error)}") from None
    weights = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} holds no state dict, but {type(weights).__name__}; save model.state_dict().")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in CODES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {str(name)[:100]!r} is {kind}, no plain tensor; save model.state_dict().")
    return {str(name): tensor for name, tensor in weights.items()}


def unreadable(error: Exception) -> str:
    """In one line, what torch says of a file that it does not load: the last of its lines names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    asked = [line for line in lines if "GLOBAL" in line]
    if asked:
        return (
            f"holds more than tensors and plain values, which could run code, and is not loaded "
            f"({asked[0][:160]}); save its state dict alone."
        )
    told = next((line for line in lines if "Unsupported" in line), lines[0])
    return f"is no plain file of torch.save ({told[:160]}); save model.state_dict(), or correct the path."


def described(weights: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Whole tensors as a manifest speaks of them, but for where they lie."""
    return {
        name: Stored(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), pieces=[])
        for name, tensor in weights.items()
    }
