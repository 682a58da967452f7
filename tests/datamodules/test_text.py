"""Text: what is read, how it is split, and one clear line for every file that is of no use."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.packing import Passage, passages
from datamodules.reading import find_files, read_documents
from datamodules.text import TextData, TokenSamples

EXCERPT = "Fellow citizens, what follows is a sentence of some length, the like of which addresses are made. "


def text_data(cache_dir: Path, **settings: Any) -> TextData:
    defaults: dict[str, Any] = {
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "seed": 0,
        "tokenizer": "bytes",
        "vocab_size": 256,
        "sequence_length": 16,
        "val_fraction": 0.1,
        "cache_dir": str(cache_dir),
    }
    return TextData(**(defaults | settings))


def tokens_of(samples: TokenSamples) -> list[int]:
    """The token stream again: each sample begins with the last token of the one before."""
    (batch,) = samples.batch(np.arange(len(samples)))
    return [int(batch[0, 0]), *batch[:, 1:].ravel().tolist()]


def packed(folder: Path, split: str) -> bytes:
    (path,) = folder.glob(f"*/{split}.bin")
    return bytes(np.fromfile(path, dtype=np.uint16).astype(np.uint8))


def test_a_sample_is_a_window_that_overlaps_the_next_by_one_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(EXCERPT * 20)
    samples = text_data(tmp_path / "cache", files=str(tmp_path / "a.txt")).train_samples()
    (batch,) = samples.batch(np.array([2, 0]))
    stream = packed(tmp_path / "cache", "train")
    assert batch.dtype == np.int64
    assert batch.flags.writeable
    assert [bytes(row.tolist()) for row in batch] == [stream[32:49], stream[0:17]]
    assert len(samples) == (len(stream) - 1) // 16


@pytest.mark.parametrize(("num_tokens", "num_samples"), [(16, 0), (17, 1), (32, 1), (33, 2), (48, 2)])
def test_the_last_sample_has_its_last_target(tmp_path: Path, num_tokens: int, num_samples: int) -> None:
    np.arange(num_tokens, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    samples = TokenSamples(tmp_path / "tokens.bin", np.dtype(np.uint16), 16)
    assert len(samples) == num_samples
    (batch,) = samples.batch(np.arange(num_samples))
    assert batch.shape == (num_samples, 17)


def test_the_bundled_corpus_is_the_default(tmp_path: Path) -> None:
    data = text_data(tmp_path, sequence_length=256, val_fraction=0.05)
    data.prepare()
    assert len(data.train_samples()) == 39904
    assert len(data.val_samples()) == 2133
    opening = data.open_tokenizer().decode(data.train_samples().batch(np.array([0]))[0][0])
    assert opening.startswith("Fellow-Citizens of the Senate and House of Representatives")


def test_text_gz_and_jsonl_are_read_alike(tmp_path: Path) -> None:
    documents = ["First.\nDocument", "Second\u2028document\x0b", "Thïrd"]
    (tmp_path / "a.txt").write_text("\f".join(documents) + "\f  \n\f", encoding="utf-8-sig")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\f".join(documents).encode()))
    lines = "\r\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in documents) + "\n\n"
    (tmp_path / "c.jsonl").write_bytes(lines.encode())
    (tmp_path / "d.JSONL.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.JSONL.gz"):
        assert read_documents(tmp_path / name) == documents


def test_globs_start_at_the_working_directory_and_give_sorted_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.txt", "b/1.txt", "b/deep/3.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [path.name for path in find_files("*.txt")] == ["1.txt", "2.txt"]
    assert [path.name for path in find_files("*")] == ["1.txt", "2.txt"]  # the folder `deep` is no file
    assert [path.name for path in find_files("~/**/*.txt")] == ["a.txt", "1.txt", "2.txt", "3.txt"]
    assert [path.name for path in find_files(["2.txt", str(tmp_path / "a.txt"), "?.txt"])] == [
        "a.txt",
        "1.txt",
        "2.txt",
    ]
    assert len(find_files("../*.txt")) == 1


UNUSABLE = {
    "empty": ("a.txt", b"", "is empty"),
    "blank": ("a.txt", b" \n\f\n", "is empty"),
    "empty_jsonl": ("a.jsonl", b'{"text": ""}\n', "is empty"),
    "nul_bytes": ("a.txt", b"GIF89a\0\0", "holds NUL bytes, so it is not text"),
    "latin1": ("a.txt", b"caf\xe9 au lait", r"is not UTF-8 text \(byte 3\)"),
    "not_gzip": ("a.txt.gz", b"plain", r"cannot be read \(Not a gzipped file .*\)"),
    "cut_gzip": ("a.gz", gzip.compress(b"text" * 100)[:-12], r"cannot be read \(.*\)"),
    "bad_json": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2 of .*a\.jsonl is not JSON \(.*\)"),
    "no_text": ("a.jsonl", b'\n{"body": "x"}\n', r'line 2 of .*a\.jsonl has no string under the key "text"'),
    "no_object": ("a.jsonl", b"[1]\n", r"line 1 of .*a\.jsonl has no string"),
    "text_is_number": ("a.jsonl", b'{"text": 5}\n', r"line 1 of .*a\.jsonl has no string"),
    "escaped_nul": ("a.jsonl", b'{"text": "a\\u0000"}\n', r"line 1 of .*a\.jsonl escapes a NUL"),
    "surrogate": ("a.jsonl", b'{"text": "a\\ud800"}\n', r"line 1 of .*a\.jsonl escapes .*half a surrogate"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_is_of_no_use_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, complaint = UNUSABLE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data\.files: .*{re.escape(name)} ?.*\.$") as raised:
        text_data(tmp_path / "cache", files=str(tmp_path / name)).prepare()
    assert re.search(complaint, str(raised.value))
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"^data\.files: .*a\.txt cannot be read \(No such file or directory\); .*\.$"):
        text_data(tmp_path / "cache", files=str(tmp_path / "*.txt")).prepare()


def test_a_glob_without_a_match_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.files='.*/no/\*\.txt' matches no file; give a glob that matches, or"):
        text_data(tmp_path / "cache", files=[str(tmp_path / "no" / "*.txt")]).prepare()


def test_a_text_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"^data\.sequence_length=16 leaves no sample in the train split: it has 10 "):
        text_data(tmp_path / "cache", files=str(tmp_path / "a.txt")).prepare()


def test_a_text_without_room_for_validation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(ValueError, match=r"in the val split: .*; raise data\.val_fraction=0\.1, or give more text\.$"):
        text_data(tmp_path / "cache", files=str(tmp_path / "a.txt")).prepare()


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": 300},
        {"tokenizer": "words"},
        {"sequence_length": 0},
        {"val_fraction": 0.0},
        {"val_fraction": 0.6},
        {"global_batch_size": -1},
        {"micro_batch_size": 1.5},
        {"seed": -1},
        {"num_workers": -1},
        {"max_val_samples": 0},
        {"files": []},
        {"sequence_lenght": 16},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        text_data(tmp_path, **wrong)


CORPORA = {
    "one_long": ["".join(f"sentence {i}, " for i in range(2000))],
    "many_small": [f"document {i} says little" for i in range(500)],
    "mixed": ["".join(f"sentence {i}, " for i in range(300)), *[f"document {i}" for i in range(50)], "z" * 999],
}


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("val_fraction", [0.5, 0.3, 0.1, 0.05])
def test_the_split_covers_the_text_once_and_holds_out_about_what_was_asked(
    tmp_path: Path, corpus: str, val_fraction: float
) -> None:
    documents = CORPORA[corpus]
    (tmp_path / "a.txt").write_text("\f".join(documents))
    text_data(tmp_path / "cache", files=str(tmp_path / "a.txt"), val_fraction=val_fraction, sequence_length=4).prepare()
    train, val = (packed(tmp_path / "cache", split).decode() for split in ("train", "val"))
    assert train.endswith("\0")
    assert val.endswith("\0")
    length = sum(map(len, documents))
    assert len(train.replace("\0", "")) + len(val.replace("\0", "")) == length
    assert len(val.replace("\0", "")) / length == pytest.approx(val_fraction, rel=1 / 8 + 1e-3)
    # Every run between two ends of text is a stretch of one document, and no two of them are the same stretch.
    runs = [run for run in (train + val).split("\0") if run]
    assert all(any(run in document for document in documents) for run in runs)
    assert sorted("".join(runs)) == sorted("".join(documents))


def test_passages_put_together_are_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789\fabcd\fefghij")
    cut = list(passages([tmp_path / "a.txt"], longest=4, val_fraction=0.3))
    assert cut == [
        Passage("0123", held_out=False, ends_run=True),
        Passage("4567", held_out=True, ends_run=True),
        Passage("89", held_out=False, ends_run=True),
        Passage("abcd", held_out=False, ends_run=True),
        Passage("efgh", held_out=False, ends_run=True),
        Passage("ij", held_out=True, ends_run=True),
    ]
    together = list(passages([tmp_path / "a.txt"], longest=2, val_fraction=0.01))
    assert [passage.text for passage in together if passage.ends_run] == ["89", "cd", "ij"]


def test_characters_are_never_cut(tmp_path: Path) -> None:
    text = "漢😀é" * 300
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    text_data(tmp_path / "cache", files=str(tmp_path / "a.txt"), val_fraction=0.07).prepare()
    for split in ("train", "val"):
        assert set(packed(tmp_path / "cache", split).decode()) == {*"漢😀é", "\0"}


def test_bpe_never_sees_text_that_is_held_out(tmp_path: Path) -> None:
    # 100 documents of one passage each, of which the 5th of each 10 is held out, and spells what the others do not.
    documents = ["qzqz" * 100 if number % 10 == 5 else "abab" * 100 for number in range(100)]
    (tmp_path / "a.txt").write_text("\f".join(documents))
    data = text_data(tmp_path / "cache", files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300)
    data.prepare()
    tokenizer = data.open_tokenizer()
    assert tokenizer.decode(tokens_of(data.val_samples())).startswith("qzqz")
    assert len(tokenizer.encode("abab" * 100)) < 50
    assert len(tokenizer.encode("qzqz" * 100)) == 400


def test_a_vocabulary_beyond_16_bits_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(EXCERPT * 20)
    wide = text_data(tmp_path / "wide", files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=2**16 + 1)
    narrow = text_data(tmp_path / "narrow", files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=2**16)
    assert tokens_of(wide.train_samples()) == tokens_of(narrow.train_samples())
    size_of = {name: next((tmp_path / name).glob("*/train.bin")).stat().st_size for name in ("wide", "narrow")}
    assert size_of["wide"] == 2 * size_of["narrow"]


def test_the_cache_follows_content_and_settings_but_not_names_or_sequence_length(tmp_path: Path) -> None:
    def num_caches(**settings: Any) -> int:
        text_data(tmp_path / "cache", **settings).prepare()
        return len(list((tmp_path / "cache").glob("*/inventory.json")))

    (tmp_path / "a.txt").write_text(EXCERPT * 20)
    (tmp_path / "same.txt").write_text(EXCERPT * 20)
    (tmp_path / "other.txt").write_text(EXCERPT * 21)
    assert num_caches(files=str(tmp_path / "a.txt")) == 1
    assert num_caches(files=str(tmp_path / "same.txt"), sequence_length=8, seed=5) == 1
    assert num_caches(files=str(tmp_path / "other.txt")) == 2
    assert num_caches(files=str(tmp_path / "a.txt"), val_fraction=0.2) == 3
    assert num_caches(files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300) == 4
    assert num_caches(files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=301) == 5
    (tmp_path / "a.txt").write_text(EXCERPT * 22)
    assert num_caches(files=str(tmp_path / "a.txt")) == 6


def test_a_truncated_cache_is_packed_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(EXCERPT * 20)
    data = text_data(tmp_path / "cache", files=str(tmp_path / "a.txt"))
    before = tokens_of(data.train_samples())
    (path,) = (tmp_path / "cache").glob("*/train.bin")
    path.write_bytes(path.read_bytes()[:100])
    assert tokens_of(data.train_samples()) == before
