"""Tokenizers: text survives the way there and back, and a vocabulary that cannot be is refused."""

import time
from pathlib import Path

import pytest

from datamodules.tokenizers import BpeTokenizer, ByteTokenizer, Gpt2Tokenizer, check_vocab_size, vocab_size

AWKWARD = "Naïve  «quotes»\r\n\t漢字 😀 e\u0301 <|endoftext|> \x0b end "
TEXTS = ["the cat sat on the mat. " * 50, "the dog sat on the log. " * 50, AWKWARD]


def test_default_sizes_are_those_of_the_vocabularies() -> None:
    assert [vocab_size(name) for name in ("bytes", "bpe", "gpt2")] == [256, 8192, 50257]
    with pytest.raises(ValueError, match=r"data\.tokenizer='words' is unknown; choose bytes, bpe, gpt2\."):
        vocab_size("words")


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 255), ("bytes", 512), ("gpt2", 50304), ("bpe", 256)])
def test_a_size_that_the_tokenizer_cannot_have_is_refused(tokenizer: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"^data\.vocab_size={size} .*data\.tokenizer={tokenizer}[,;].*\.$"):
        check_vocab_size(tokenizer, size)


def test_bytes_come_back_as_the_same_text() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(AWKWARD)
    assert len(tokens) == len(AWKWARD.encode())
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode([*tokens, tokenizer.end_of_text]) == AWKWARD


def test_bpe_comes_back_as_the_same_text_in_fewer_tokens() -> None:
    tokenizer = BpeTokenizer.train(TEXTS, 300)
    for text in [*TEXTS, "unseen: ÿ ☃"]:
        tokens = tokenizer.encode(text)
        assert tokens.max() < 300
        assert tokenizer.end_of_text not in tokens
        assert tokenizer.decode([*tokens, tokenizer.end_of_text]) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_is_the_same_when_trained_again_and_when_loaded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        BpeTokenizer.train(TEXTS, 300).save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    loaded = BpeTokenizer.load(tmp_path / "a")
    assert loaded.encode(AWKWARD).tolist() == BpeTokenizer.train(TEXTS, 300).encode(AWKWARD).tolist()


def test_gpt2_that_cannot_be_downloaded_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody listens
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^data\.tokenizer=gpt2 needs vocab\.bpe .* set TIKTOKEN_CACHE_DIR .*bpe\.$"):
        Gpt2Tokenizer()
    assert time.monotonic() - start < 12
