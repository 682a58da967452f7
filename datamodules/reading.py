"""The user's text files: which they are, and the documents in them."""

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from datamodules.refused import RefusedError

BUNDLED = Path(__file__).parent / "corpora" / "state_of_the_union.txt.gz"


def find_files(files: str | list[str] | None) -> list[Path]:
    """Absolute paths that the globs match, sorted and each once; the bundled corpus for None.

    Relative globs start at the current working directory; `~` is the home folder, `**` any number of folders.

    Raises:
        ValueError: a glob matches no file.
    """
    if files is None:
        return [BUNDLED]
    found: set[Path] = set()
    for pattern in [files] if isinstance(files, str) else files:
        absolute = Path.cwd() / Path(pattern).expanduser()
        matches = Path(absolute.anchor).glob(str(absolute.relative_to(absolute.anchor)))
        paths = {path for path in matches if not path.is_dir()}
        if not paths:
            raise RefusedError(
                f"data.files={pattern!r} matches no file; give a glob that matches, or leave it out for the bundled "
                "corpus."
            )
        found |= paths
    return sorted(found)


def file_format(path: Path) -> str:
    """How a file is read: `text` or `jsonl`, with `.gz` where it is compressed; decided by its name alone."""
    name = path.name.lower()
    kind = "jsonl" if name.removesuffix(".gz").endswith(".jsonl") else "text"
    return f"{kind}.gz" if name.endswith(".gz") else kind


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a file; ValueError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_documents(path: Path) -> list[str]:
    """The documents of one file that are not blank: form feeds part a text file, lines a JSON Lines file.

    Raises:
        ValueError: the file is unreadable, not UTF-8, binary, malformed or empty; one line that names it.
    """
    text = _read_text(path)
    documents = _json_texts(path, text) if file_format(path).startswith("jsonl") else text.split("\f")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RefusedError(f"data.files: {path} is empty; remove it, or narrow the glob.")
    return documents


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    # UTF-16 and most binary formats hold NUL bytes; text never does, so a NUL can stand for "end of text".
    if b"\0" in raw:
        raise RefusedError(f"data.files: {path} holds NUL bytes, so it is not text; remove it, or narrow the glob.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"data.files: {path} is not UTF-8 text (byte {error.start}); convert it, or narrow the glob."
        ) from None


def _json_texts(path: Path, text: str) -> list[str]:
    # Only a line feed ends a line: str.splitlines would also cut at characters that JSON allows inside a string.
    return [
        _json_text(line, f"data.files: line {number} of {path}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _json_text(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RefusedError(f"{where} is not JSON ({error.msg}); mend the line.") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise RefusedError(f'{where} has no string under the key "text"; give every line as {{"text": "..."}}.')
    # JSON's escapes can say what a text file cannot hold: NUL, and halves of surrogate pairs.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RefusedError(f"{where} escapes a NUL or half a surrogate pair, so it is not text; mend the line.")
    return text


def _unreadable(path: Path, error: Exception) -> RefusedError:
    cause = error.strerror if isinstance(error, OSError) and error.strerror else error
    return RefusedError(f"data.files: {path} cannot be read ({cause}); mend or remove it, or narrow the glob.")
