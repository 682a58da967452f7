"""How documents become two files of tokens: cut into passages, split, tokenised, packed."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.reading import read_documents
from datamodules.tokenizers import BpeTokenizer, ByteTokenizer, Gpt2Tokenizer, Tokenizer

# Part of the cache's key: raise it whenever the same text and settings give other tokens than before.
FORMAT_VERSION = 1

# Long enough that a passage holds many samples; a corpus of less than megabytes is cut into shorter ones, so that
# what is held out comes in several places.
_LONGEST_PASSAGE = 64 * 1024
_MIN_HELD_OUT_PASSAGES = 4


class Passage(NamedTuple):
    """A stretch of one document that lies in one split; `ends_run` where its split goes on with other text."""

    text: str
    held_out: bool
    ends_run: bool


def token_file(folder: Path, split: str) -> Path:
    """Where `pack` puts the tokens of `train` or `val`: raw, of `token_dtype`, in the byte order of the machine."""
    return folder / f"{split}.bin"


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest integer that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def passages(paths: list[Path], *, longest: int, val_fraction: float) -> Iterator[Passage]:
    """Cut documents into passages of at most `longest` characters, and hold out `val_fraction` of the text.

    A passage is held out where that brings the share of what is held out nearer to `val_fraction`: spread over the
    whole text, for one long document as for many short ones, and never off by more than half a passage.
    """
    seen = held_out = 0
    for document in (document for path in paths for document in read_documents(path)):
        texts = [document[start : start + longest] for start in range(0, len(document), longest)]
        choices: list[bool] = []
        for text in texts:
            seen += len(text)
            choices.append(val_fraction * seen - held_out > len(text) / 2)
            held_out += choices[-1] * len(text)
        for text, choice, following in zip(texts, choices, [*choices[1:], None], strict=True):
            yield Passage(text, choice, ends_run=choice is not following)


def pack(folder: Path, *, paths: list[Path], tokenizer: str, vocab_size: int, val_fraction: float) -> None:
    """Write the tokens of both splits, and the trained vocabulary if there is one, into `folder`.

    A run of adjacent passages is followed by one end of text, so that no sample joins texts that do not belong
    together without a mark between them. One file is in memory at a time.
    """
    num_characters = sum(len(document) for path in paths for document in read_documents(path))
    longest = max(1, min(_LONGEST_PASSAGE, int(num_characters * val_fraction / _MIN_HELD_OUT_PASSAGES)))
    cut = partial(passages, paths, longest=longest, val_fraction=val_fraction)
    trained = _train(folder, cut(), vocab_size) if tokenizer == "bpe" else open_tokenizer(tokenizer, folder)
    dtype = token_dtype(vocab_size)
    end_of_text = np.array([trained.end_of_text], dtype=dtype)
    with token_file(folder, "train").open("wb") as train, token_file(folder, "val").open("wb") as val:
        for passage in cut():
            split = val if passage.held_out else train
            trained.encode(passage.text).astype(dtype).tofile(split)
            if passage.ends_run:
                end_of_text.tofile(split)


def open_tokenizer(tokenizer: str, folder: Path) -> Tokenizer:
    """The tokenizer that packed the tokens in `folder`."""
    if tokenizer == "bpe":
        return BpeTokenizer.load(folder)
    return ByteTokenizer() if tokenizer == "bytes" else Gpt2Tokenizer()


def _train(folder: Path, cut: Iterator[Passage], vocab_size: int) -> Tokenizer:
    tokenizer = BpeTokenizer.train((passage.text for passage in cut if not passage.held_out), vocab_size)
    tokenizer.save(folder)
    return tokenizer
