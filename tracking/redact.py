"""Takes secrets out of a config before it leaves the machine."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

MASK = "***"

# A name is split into words (hf_token, apiKey, AWS_ACCESS_KEY_ID); these make it a secret wherever they stand ...
SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
# ... these only as the last word: token_count, key_dim and tokenizer are no secrets, access_token is one ...
SECRET_LAST_WORDS = {"token", "key", "auth", "authorization", "bearer"}
# ... unless what they name is a token of text ...
TEXT_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "start", "end", "special"}
# ... and these pairs also in the middle, as in aws_access_key_id.
SECRET_PAIRS = {
    (kind, word) for kind in ("api", "access", "private", "auth") for word in ("key", "keys", "token", "tokens")
}

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]+(?=@)")  # RFC 3986, section 3.2.1: userinfo
ASSIGNMENT = re.compile(r"([\w.\-]+)=([^\s&,;]+)")  # of a URL's query, or of a command line


def redact(value: Any, name: str = "") -> Any:
    """`value` (what JSON can hold) with `***` for the value of every secret name and for credentials in URLs.

    A number, a truth value or None is left as it is, except under a password's name: pad_token=0 is no secret.
    """
    if isinstance(value, Mapping) and not is_secret(name):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple) and not is_secret(name):
        return [redact(item) for item in value]
    if is_secret(name):
        is_plain = value is None or isinstance(value, bool) or (isinstance(value, int | float) and not _always(name))
        return value if is_plain else MASK
    return _redact_text(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Whether a value of this name is one to keep from others."""
    words = _words(name)
    if not words or _always(name):
        return bool(words)
    if SECRET_PAIRS & set(pairwise(words)):
        return True
    return words[-1] in SECRET_LAST_WORDS and not TEXT_TOKENS & set(words)


def _always(name: str) -> bool:
    return bool(SECRET_WORDS & set(_words(name)))


def _words(name: str) -> list[str]:
    return [word.lower() for word in WORD.findall(name)]


def _redact_text(text: str) -> str:
    text = URL_CREDENTIALS.sub(MASK, text)
    return ASSIGNMENT.sub(lambda found: f"{found[1]}={MASK}" if is_secret(found[1]) else found[0], text)
