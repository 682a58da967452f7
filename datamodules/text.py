"""Text for a language model: the bundled corpus or the user's files, as samples of a fixed length."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from datamodules.cache import cache_key, cache_root, cached_folder
from datamodules.order import Indices
from datamodules.packing import FORMAT_VERSION, open_tokenizer, pack, token_dtype, token_file
from datamodules.reading import file_digest, file_format, find_files
from datamodules.refused import RefusedError
from datamodules.spec import FORBID_EXTRA, SampledData
from datamodules.tokenizers import Tokenizer, check_vocab_size


class TokenSamples:
    """Sample `i` is tokens [i * T, i * T + T] of a file: `T` inputs, and as targets the same shifted by one."""

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger], sequence_length: int) -> None:
        self._opening = path, dtype, sequence_length
        self._tokens = np.memmap(path, dtype=dtype, mode="r")
        self._window = np.arange(sequence_length + 1, dtype=np.int64)

    def __reduce__(self) -> tuple[Callable[..., "TokenSamples"], tuple[Any, ...]]:
        # A memory map would be pickled by value: a loader's worker process opens the file itself.
        return TokenSamples, self._opening

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // (len(self._window) - 1)

    def batch(self, indices: Indices) -> tuple[NDArray[np.int64]]:
        """Token ids [batch, T + 1]."""
        starts = indices * (len(self._window) - 1)
        return (self._tokens[starts[:, None] + self._window].astype(np.int64),)


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class TextData(SampledData):
    """Settings of text: `files` is a glob, several, or None for the bundled corpus; a sample has `sequence_length`
    tokens; `val_fraction` of the text is held out; tokens are cached in `cache_dir` (None: the user's cache folder).
    """

    files: str | Annotated[list[str], Field(min_length=1)] | None = None
    tokenizer: Literal["bytes", "bpe", "gpt2"]
    vocab_size: PositiveInt
    sequence_length: PositiveInt
    # At most half, so that there is more to train on than to validate on.
    val_fraction: float = Field(gt=0, le=0.5)
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_vocab_size(self.tokenizer, self.vocab_size)

    @property
    def tokens_per_sample(self) -> int:
        return self.sequence_length

    def prepare(self) -> None:
        self.train_samples()
        self.val_samples()

    def source_files(self) -> list[Path]:
        return find_files(self.files)

    def train_samples(self) -> TokenSamples:
        return self._samples("train", "give more text, or lower data.sequence_length.")

    def val_samples(self) -> TokenSamples:
        return self._samples("val", f"raise data.val_fraction={self.val_fraction}, or give more text.")

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer of these samples, trained if need be; for turning token ids back into text."""
        return open_tokenizer(self.tokenizer, self._folder())

    def _samples(self, split: str, fix: str) -> TokenSamples:
        path = token_file(self._folder(), split)
        dtype = token_dtype(self.vocab_size)
        num_tokens = path.stat().st_size // dtype.itemsize
        if num_tokens <= self.sequence_length:
            raise RefusedError(
                f"data.sequence_length={self.sequence_length} leaves no sample in the {split} split: it has "
                f"{num_tokens} tokens and a sample takes {self.sequence_length + 1}; {fix}"
            )
        return TokenSamples(path, dtype, self.sequence_length)

    def _folder(self) -> Path:
        """The token files, packed now unless they have been for the same text and settings."""
        paths = find_files(self.files)
        packing = partial(
            pack,
            paths=paths,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            val_fraction=self.val_fraction,
        )
        content = [[file_format(path), file_digest(path)] for path in paths]
        key = cache_key({**packing.keywords, "paths": content, "format_version": FORMAT_VERSION})
        return cached_folder(cache_root(self.cache_dir), key, packing)
