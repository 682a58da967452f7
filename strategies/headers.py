"""Headers of safetensors files, read and believed only where they fit the file. Pure Python, runs nothing it reads.

The format: length of the header in 8 bytes, the header as JSON, the tensors' bytes
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

HEADER_BYTES = 100_000_000  # what safetensors itself reads at most (MAX_HEADER_SIZE of its Rust source)

# Formats as safetensors spells them: as torch does, and bytes of an element.
DTYPES = {
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
PAIRED = {"complex128": "float64"}  # which the format does not know: a last dim holds real and imaginary parts
ITEM_BYTES = {**dict(DTYPES.values()), "complex128": 16}

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Counts = Annotated[tuple[Count, ...], Field(max_length=64)]  # dims, of which torch indexes no more


class Entry(BaseModel):
    """One tensor of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: Counts
    data_offsets: tuple[Count, Count]

    @property
    def torch_dtype(self) -> str:
        return DTYPES[self.dtype][0]


def as_filed(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Format and shape by which a file has a tensor."""
    return (PAIRED[dtype], (*shape, 2)) if dtype in PAIRED else (dtype, shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file; ValueError in one line if it is none, or says of itself what is not so."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                raise ValueError("it is no safetensors file")
            tree = read_json(file.read(length))
        if not isinstance(tree, dict):
            raise ValueError("its header is no JSON object")
        entries = {name: Entry.model_validate(entry) for name, entry in tree.items() if name != "__metadata__"}
        check_offsets(entries, size - 8 - length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; correct the path.") from None
    except ValidationError as error:
        raise ValueError(f"{path} is damaged (its header: {reason(error)}); choose another file.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another file.") from None
    return entries


def check_offsets(entries: dict[str, Entry], size: int) -> None:
    """ValueError unless the tensors, as they say of themselves, fill the rest of the file, each byte once."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name[:100]!r} is of the unknown format {entry.dtype[:100]!r}")
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * DTYPES[entry.dtype][1]:
            raise ValueError(f"{name[:100]!r} does not lie where its header says")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, {size} are there")


def read_json(text: bytes | str) -> Any:
    """ValueError in one line for what is no JSON, or is nested as no JSON of ours is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None


def reason(error: ValidationError) -> str:
    """`files.0: Field required` for the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    place, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    return f"{place[:100]!r}: {message}" if place else message
