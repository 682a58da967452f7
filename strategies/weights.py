"""Weights that a run may start from, wherever they lie: every kind shown as a checkpoint's manifest. Pure Python."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from strategies.boxes import Box
from strategies.checkpoint import AVERAGE, MANIFEST, File, Manifest, Piece, Stored, newest, plain_name
from strategies.headers import read_header, read_json

INDEX = "model.safetensors.index.json"  # as Hugging Face calls it
INDEX_BYTES = 2**26  # a model of a million tensors has less


class Source(NamedTuple):
    """A folder, and what is in it; a plain file's tensors are pieces under their own names."""

    folder: Path
    manifest: Manifest


def find_weights(path: Path) -> Path:
    """What is meant by a file or folder: itself, or a run's newest checkpoint; ValueError if it is neither."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; correct the path.")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is no .safetensors file; convert it first: python scripts/convert.py --from {path} <folder>."
            )
        return path
    if (path / MANIFEST).is_file() or (path / INDEX).is_file():
        return path
    found = newest(path)
    if found is None:
        raise ValueError(
            f"{path} has no {MANIFEST}, no {INDEX} and no checkpoints of a run; give a folder that has one."
        )
    return found


def weights_of(path: Path) -> Source:
    """The weights that lie at a path which `find_weights` has found, and nothing else that may lie there.

    ValueError in one line if what is there does not fit together; tensors themselves are not read.
    """
    if path.is_file():
        return Source(path.parent, manifest_of(path.parent, [path.name]))
    if (path / MANIFEST).is_file():
        return Source(path, only_weights(Manifest.read(path)))
    return Source(path, manifest_of(path, indexed_files(path / INDEX)))


def averages_of(path: Path) -> Source:
    """The same with the moving average of each weight that has one in its place; ValueError where none has."""
    manifest = Manifest.read(path) if (path / MANIFEST).is_file() else None
    prefix = f"state/{AVERAGE}/"
    averages = {
        name.removeprefix(prefix): one
        for name, one in (manifest.tensors if manifest else {}).items()
        if name.startswith(prefix)
    }
    if manifest is None or not averages:
        raise ValueError(f"--weights ema: {path} holds no average of weights; train with callbacks=ema.")
    tensors = {
        name: averages.get(name.removeprefix("weight/"), one) for name, one in only_weights(manifest).tensors.items()
    }
    return Source(path, manifest.model_copy(update={"tensors": tensors}))


def only_weights(manifest: Manifest) -> Manifest:
    """What a checkpoint has beside its optimizer's state."""
    weights = {name: stored for name, stored in manifest.tensors.items() if name.startswith("weight/")}
    return manifest.model_copy(update={"tensors": weights})


def check_weights(path: Path) -> None:
    """ValueError in one line if they are damaged, as far as that can be told: plain files have no digests."""
    folder, manifest = weights_of(path)
    if (path / MANIFEST).is_file():
        manifest.check(folder)


def manifest_of(folder: Path, files: list[str]) -> Manifest:
    """The tensors of plain safetensors files, as a checkpoint has them; ValueError if one is there twice."""
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, entry in read_header(folder / file).items():
            if f"weight/{name}" in tensors:
                raise ValueError(f"{folder / file} is damaged ({name[:100]!r} is in another file, too).")
            whole = Box.whole(entry.shape)
            piece = Piece(file=file, key=name, start=whole.start, stop=whole.stop)
            tensors[f"weight/{name}"] = Stored(shape=entry.shape, dtype=entry.torch_dtype, pieces=[piece])
    return Manifest(
        step=0,
        strategy="plain",
        mesh={},
        trained={},
        schedulers=[],
        files={file: File(size=(folder / file).stat().st_size, sha256="") for file in files},
        tensors=tensors,
    )


def indexed_files(index: Path) -> list[str]:
    """The files that an index names; ValueError if it is none, or names one that lies elsewhere."""
    try:
        if index.stat().st_size > INDEX_BYTES:
            raise ValueError(f"it has more than {INDEX_BYTES} bytes")
        tree = read_json(index.read_bytes())
        places = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(places, dict) or not places:
            raise ValueError("it has no weight_map")
        return sorted({plain_name(str(file)) for file in places.values()})
    except ValueError as error:
        raise ValueError(f"{index} is damaged ({error}); choose another folder.") from None
