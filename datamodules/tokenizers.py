"""How text becomes token ids: bytes, a BPE vocabulary trained on the user's text, or GPT-2's."""

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.refused import RefusedError

# GPT-2's is 50,000 merges, 256 bytes and the end of text (Radford et al., "Language Models are Unsupervised Multitask
# Learners", 2019); 8192 suits corpora of tens of megabytes and keeps the head of a small model small.
DEFAULT_VOCAB_SIZES = {"bytes": 256, "bpe": 8192, "gpt2": 50257}
_SMALLEST_BPE = 257  # every byte, so that any text can be encoded, and the end of text
_BPE_FILE = "tokenizer.json"
_GPT2_TIMEOUT_S = 10


def vocab_size(tokenizer: str) -> int:
    """The vocabulary size of a tokenizer unless another one is asked for; ValueError for an unknown name."""
    if tokenizer not in DEFAULT_VOCAB_SIZES:
        raise RefusedError(f"data.tokenizer={tokenizer!r} is unknown; choose {', '.join(DEFAULT_VOCAB_SIZES)}.")
    return DEFAULT_VOCAB_SIZES[tokenizer]


def check_vocab_size(tokenizer: str, size: int) -> None:
    """ValueError when `tokenizer` cannot have a vocabulary of `size`."""
    default = vocab_size(tokenizer)
    if tokenizer == "bpe" and size < _SMALLEST_BPE:
        raise RefusedError(
            f"data.vocab_size={size} is too small for data.tokenizer=bpe; give at least {_SMALLEST_BPE}."
        )
    if tokenizer != "bpe" and size != default:
        raise RefusedError(
            f"data.vocab_size={size} contradicts data.tokenizer={tokenizer}, which has {default}; leave it out, or "
            "choose data.tokenizer=bpe."
        )


class Tokenizer(ABC):
    """Text to token ids and back, without loss; `end_of_text` is an id that no text is encoded to."""

    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`, without an end of text; what looks like a special token is ordinary text."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids, the end of text left out; a character that was cut in two becomes U+FFFD."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: no vocabulary to train, and a loss that is in nats per byte."""

    end_of_text = 0  # NUL, which no accepted text holds

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token != self.end_of_text).decode(errors="replace")


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding, trained on the user's own text with Hugging Face tokenizers."""

    end_of_text = 0

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation
        # A text that spells out the end of text must not end anything.
        implementation.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "BpeTokenizer":
        """A vocabulary of `size` ids, fewer where the text has no more pairs to merge; the same for the same texts."""
        from tokenizers import Tokenizer as Implementation
        from tokenizers import decoders, models, pre_tokenizers, trainers

        implementation = Implementation(models.BPE())
        implementation.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        implementation.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>"],  # the first special token is id 0
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        implementation.train_from_iterator(texts, trainer)
        return cls(implementation)

    @classmethod
    def load(cls, folder: Path) -> "BpeTokenizer":
        """The tokenizer that `save` left in `folder`."""
        from tokenizers import Tokenizer as Implementation

        return cls(Implementation.from_file(str(folder / _BPE_FILE)))

    def save(self, folder: Path) -> None:
        """Write the vocabulary and merges into `folder`, in Hugging Face's format."""
        (folder / _BPE_FILE).write_text(self._implementation.to_str(), encoding="utf-8")

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._implementation.encode(text).ids, dtype=np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._implementation.decode(list(tokens)))


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's vocabulary, through tiktoken."""

    end_of_text = 50256

    def __init__(self) -> None:
        """Open the vocabulary; ValueError when it is not in tiktoken's cache and cannot be downloaded."""
        import tiktoken

        _fetch_gpt2()
        self._implementation = tiktoken.get_encoding("gpt2")

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._implementation.encode_ordinary(text), dtype=np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._implementation.decode([token for token in tokens if token != self.end_of_text]))


def _fetch_gpt2() -> None:
    # tiktoken downloads without a timeout: let it fill its cache in a process that can be stopped.
    fetch = "import tiktoken; tiktoken.get_encoding('gpt2')"
    try:
        subprocess.run([sys.executable, "-c", fetch], timeout=_GPT2_TIMEOUT_S, check=True, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise RefusedError(
            "data.tokenizer=gpt2 needs vocab.bpe and encoder.json, which tiktoken could not download; on a machine "
            f'that can, run `TIKTOKEN_CACHE_DIR=gpt2 python -c "{fetch}"`, copy the folder here and set '
            "TIKTOKEN_CACHE_DIR to it, or choose data.tokenizer=bpe."
        ) from None
