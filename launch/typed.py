"""The words of a command line as Hydra takes them, and what to type instead of those that mean nothing to it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from launch.keys import choices_of, did_you_mean, groups, is_key, meant, none_of, takes_several
from launch.schema import ConfigError

# Flags of Hydra's, and how many words behind each belong to it (None: one, if it is there).
HYDRA_FLAGS: dict[str, int | None] = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"), 0),
    **dict.fromkeys(("--multirun", "-m", "--shell-completion", "-sc"), 0),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"), 1),
    **dict.fromkeys(("--config-dir", "-cd", "--experimental-rerun"), 1),
    **dict.fromkeys(("--info", "-i"), None),
}
SWEEPS = ("-m", "--multirun")
HOME = re.compile(r"(?<=[=,\[ ])~(?:[\w.-]*)(?:/[^,\]\['\"()]*|(?=[,\]]|$))")
FOLDERS = ("run_dir", "hydra.run.dir", "hydra.sweep.dir", "resume_sweep")


def quoted(value: object) -> str:
    """A value as an override takes it, whatever characters it holds."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def spelled(overrides: Sequence[str]) -> list[str]:
    """`debug=nan` as the name of a choice: Hydra would take it for a number."""
    return ["debug='nan'" if word == "debug=nan" else word for word in overrides]


def read_words(words: Sequence[str], flags: Mapping[str, int | None] = HYDRA_FLAGS) -> list[str]:
    """The words with flags first and each override in Hydra's spelling; ConfigError for one that is neither."""
    found: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    if set(flags) & {"-sc"} & set(words) or "--shell-completion" in words:  # a shell asks, of half a line
        return rest
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            overrides.append(word)
            continue
        name = word.partition("=")[0]
        if name not in flags:
            raise ConfigError(no_flag(word, rest[0] if rest else None, flags))
        found.append(word)
        behind = flags[name]
        if (behind is None and rest and rest[0].isalpha()) or (behind and "=" not in word and rest):
            found.append(rest.pop(0))
    if set(SWEEPS) & set(found) and not overrides and len(found) == 1:
        raise ConfigError(
            f"{found[0]} has nothing to sweep over; give a key several values, such as strategy=ddp,zero1."
        )
    read = [read_override(word, overrides[:place], overrides[place + 1 :]) for place, word in enumerate(overrides)]
    check_twice(overrides, sweeps=bool(set(SWEEPS) & set(found)))
    return [*found, *spelled(read)]


def no_flag(word: str, following: str | None, flags: Collection[str]) -> str:
    """What to type instead of a flag that there is not."""
    name, has_value, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if key in flags or (close := get_close_matches(name, flags, n=1, cutoff=0.8)):
        return f"{word} is no flag; did you mean {close[0] if key not in flags else key}?"
    known = key if is_key(key) else meant(key) or key
    takes = following is not None and "=" not in following and not following.startswith("-")
    value = value if has_value else (following or "") if takes else "..."
    return f"{word} is no flag; keys are given as key=value: {known}={value}"


def read_override(word: str, before: Sequence[str], behind: Sequence[str]) -> str:
    """One override in Hydra's spelling; ConfigError, with what to type instead, if it is none."""
    key, is_one, value = word.partition("=")
    bare = key.lstrip("+~")
    if key.startswith("~"):
        if bare in groups():
            raise ConfigError(f"{word}: {bare} needs a choice; {choose(bare)}")
        return word
    if not is_one or not re.fullmatch(r"\+{0,2}[^\s=+~]+", key):
        raise ConfigError(no_override(word, before, behind))
    if bare in groups():
        return read_choice(key, value)
    if bare in FOLDERS and not value.strip("'\" "):
        raise ConfigError(f"{word} is empty; give a folder, or leave {bare} out.")
    if not value:
        raise ConfigError(f"{word} has no value; give one, or {key}=null for none, or {key}=\"''\" for an empty text.")
    if value.startswith("="):
        raise ConfigError(f"{word}: write one =: {key}{value}")
    return f"{key}={HOME.sub(lambda found: at_home(found[0]), '=' + value)[1:]}"


def at_home(path: str) -> str:
    """A path below ~ with the folder that it stands for, which no shell puts in the middle of a word."""
    full = os.path.expanduser(path)  # noqa: PTH111  # pathlib raises where there is no such user
    return path if full == path else quoted(full)


def read_choice(key: str, value: str) -> str:
    """The choice in a group by the name of its file, or of more than one, in a sweep."""
    group = key.lstrip("+")
    if not value or (value == "null" and none_of(group) != "null"):
        raise ConfigError(f"{key}={value}: {group} is a group of which one must be chosen; {choose(group)}")
    if value.startswith("[") and not takes_several(group):
        names = value.strip("[] ")
        raise ConfigError(f"{key}={value} is a list; write {key}={names}, and for several of them -m {key}=a,b")
    if value.startswith("=") or ":" in value:
        raise ConfigError(f"{key}={value} is no choice; {choose(group)}")
    return f"{key}={re.sub(r'[.]ya?ml(?=[],]|$)', '', value)}"


def choose(group: str) -> str:
    """What there is to choose in a group, as advice."""
    none = f", or {group}={none_of(group)} for none" if none_of(group) else ""
    return f"choose {group}= one of {', '.join(choices_of(group))}{none}."


def no_override(word: str, before: Sequence[str], behind: Sequence[str]) -> str:
    """What somebody means by a word that is no override, and what to type instead."""
    last, following = before[-1] if before else "", behind[0] if behind else ""
    if last.endswith((",", "=")) or word.startswith(","):
        return f"{word} stands apart behind a space; write {last}{word}, or put the whole in quotes: '{last} {word}'"
    if following.startswith("=") or word.endswith((" ", "=")):
        return f"{word}: leave the space out around =; write {word.strip(' =')}=..."
    if word.count(":") == 1 and is_key(word.split(":")[0]):
        return f"{word} is no override; write {word.replace(':', '=').replace(' ', '')}"
    for group in groups():
        if word in choices_of(group):
            return f"{word} is no override; write {group}={word}"
    key = word.partition("=")[0].strip()
    if " " in word.partition("=")[0]:
        return f"{word!r} is no override; leave the space in front of = out: {key.split()[-1]}={word.partition('=')[2]}"
    if is_key(key):
        return f"{word} has no value; write {key}=..."
    if is_key(last.partition("=")[0]):
        return f'{word} is no override; if it belongs to {last}, put the whole in quotes: "{last} {word}"'
    known = did_you_mean(key) if meant(key) else "."
    return f"{word} is no override; write key=value, such as strategy=ddp{known}"


def check_twice(overrides: Sequence[str], *, sweeps: bool) -> None:
    """ConfigError for two choices in one group: somebody who types both does not know that the last one counts."""
    chosen: dict[str, str] = {}
    for word in overrides:
        group, _, value = word.partition("=")
        if group not in groups():
            continue
        if chosen.setdefault(group, value) != value:
            flag = "" if sweeps else "-m "
            if takes_several(group):
                raise ConfigError(f"{word}: {group} is there twice; give one list, as {group}=[a,b]")
            raise ConfigError(
                f"{group}={chosen[group]} {group}={value}: a run has one; give one of them, or for a run of each "
                f"{flag}{group}={chosen[group]},{value}"
            )
