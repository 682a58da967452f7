"""How weights from elsewhere are made to fit a model: under which names, and what may be lacking or left out.

Pure Python: patterns are tried on the names in the files before a process starts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from strategies.checkpoint import Manifest

Rename = Callable[[str], str]

SHOWN = 4  # patterns or names that a line has at most


class Fitting(NamedTuple):
    """What the user says of weights beside where they lie."""

    rename: Sequence[str] = ()  # `old:new`, tried in this order
    ignore: Sequence[str] = ()  # globs of what is left out, by the new names
    may_lack: Sequence[str] = ()  # globs of the model's tensors that may keep their initial values


class Fitted(NamedTuple):
    """Weights under the model's names, without what is to be left out."""

    manifest: Manifest
    ignored: list[str]


def fitted(manifest: Manifest, fitting: Fitting) -> Fitted:
    """ValueError naming the first pattern that is none, or fits nothing."""
    names = [name.removeprefix("weight/") for name in manifest.tensors]
    for pair in fitting.rename:
        one = renamer([pair], ":", "model.weights_rename")
        if all(one(name) == name for name in names):
            raise ValueError(f"model.weights_rename={pair}: no tensor there is called so; correct it, or leave it out")
    new = renamed(names, renamer(fitting.rename, ":", "model.weights_rename"), "model.weights_rename")
    for glob in fitting.ignore:
        if not any(fnmatchcase(name, glob) for name in new):
            raise ValueError(f"model.weights_ignore={glob}: no tensor there is called so; correct it, or leave it out")
    ignored = sorted(name for name in new if matches_any(name, fitting.ignore))
    kept = {f"weight/{name}": manifest.tensors[f"weight/{old}"] for name, old in new.items() if name not in ignored}
    return Fitted(manifest.model_copy(update={"tensors": kept}), ignored)


def matches_any(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def renamer(pairs: Sequence[str], sign: str, key: str) -> Rename:
    """A function that renames by the first of `old<sign>new` pairs that fits; ValueError for what is no pair.

    `old` is a prefix, or with stars all of a name, whose parts come into the stars of `new`.
    """
    rules = [rule(pair, sign, key) for pair in pairs]

    def rename(name: str) -> str:
        for pattern, new in rules:
            if found := pattern.fullmatch(name):
                parts = iter(found.groups())
                return "".join(next(parts) if part == "*" else part for part in re.split(r"(\*)", new))
        return name

    return rename


def rule(pair: str, sign: str, key: str) -> tuple[re.Pattern[str], str]:
    old, found, new = pair.partition(sign)
    if not found or sign in new or pair == sign:
        raise ValueError(f"{key}={pair}: give old{sign}new, two prefixes of names, of which one may be empty.")
    if old.count("*") != new.count("*"):
        raise ValueError(f"{key}={pair}: give both sides as many stars.")
    if "*" not in old:
        old, new = f"{old}*", f"{new}*"
    return re.compile("(.*)".join(map(re.escape, old.split("*"))), re.DOTALL), new


def renamed(names: Iterable[str], rename: Rename, key: str) -> dict[str, str]:
    """By its new name, each name; ValueError if two would become the same."""
    result: dict[str, str] = {}
    for name in names:
        new = rename(name)
        if new in result:
            raise ValueError(f"{key}: {result[new]} and {name} would both be {new}; give other prefixes.")
        result[new] = name
    return result


def prefixes_that_fit(there: Iterable[str], wanted: Sequence[str]) -> str | None:
    """`old:new`, by which most of the names that are wanted would be there; None if that is not half of them."""
    by_end: dict[tuple[str, ...], list[str]] = {}
    for name in there:
        by_end.setdefault(tuple(name.split(".")[-2:]), []).append(name)
    pairs: Counter[str] = Counter()
    for name in wanted:
        for other in by_end.get(tuple(name.split(".")[-2:]), []):
            old, new = without_common_end(other, name)
            pairs[f"{old}:{new}"] += 1
    if not pairs:
        return None
    pair, count = pairs.most_common(1)[0]
    return pair if 2 * count >= len(wanted) and pair != ":" else None


def without_common_end(one: str, other: str) -> tuple[str, str]:
    """Two dotted names without the parts in which they end alike."""
    first, second = one.split("."), other.split(".")
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return "".join(f"{part}." for part in first), "".join(f"{part}." for part in second)


def globs_of(names: Iterable[str]) -> str:
    """A few globs for names, with a star for each number, as the command line takes a list of them."""
    globs = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name[:100]) for name in names))
    return f"[{','.join(globs[:SHOWN])}{',...' if len(globs) > SHOWN else ''}]"


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are; empty if there are none."""
    return f" ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})" if names else ""
