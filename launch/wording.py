"""One line for whatever Hydra, OmegaConf, YAML or the system say of a mistake: key, value, and what to do."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches

import yaml
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from launch.keys import choices_of, did_you_mean, groups, load, relative, shown, takes_several, written, yaml_files
from launch.schema import ConfigError

# All that is a mistake of the user's, of what may be raised while a command line and a config are read.
MISTAKES = (ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)

NOISE = (
    "full_key:", "object_type=", "reference_type=", "To append to your", "See https", "Config search path",
    "provider=", "Set the environment variable",
)  # fmt: skip


def one_line(error: BaseException) -> str:
    """What an exception says of a mistake, on one line, with what to do about it where that can be known."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, yaml.YAMLError):
        return of_yaml(error)
    if isinstance(error, MissingConfigException):
        return of_choice(error)
    if isinstance(error, OSError):
        return of_system(error)
    if isinstance(error, OverrideParseException):
        return of_grammar(error)
    if isinstance(error, ConfigCompositionException):
        return of_composition(error)
    if isinstance(error, OmegaConfBaseException | UnicodeDecodeError | HydraException):
        return of_files(error)
    return joined(error)


def of_files(error: Exception) -> str:
    """What stands in a YAML file that composes no config, with its place."""
    said, key = (
        re.sub(r"^\w+ raised while resolving interpolation: ", "", joined(error)),
        getattr(error, "full_key", None),
    )
    named = re.search(r"Interpolation key '(.+?)'|at input '(.+?)'|custom interpolation type '?(.+?)'? ", said)
    text = next(filter(None, named.groups())) if named else ""
    if places := written(re.escape(text if "$" in text else "${" + text)) if text else []:
        return f"{places[0]}: {said.rstrip('.')}; mend what stands in ${{...}}."
    return broken_file() or (f"{key}: {said}" if key else said)


def broken_file() -> str | None:
    """What is wrong with the first YAML file of which no config can be made, whatever is asked for; None: nothing."""
    for path in yaml_files():
        try:
            tree = load(path)
        except yaml.YAMLError as broken:
            return of_yaml(broken)
        except UnicodeDecodeError:
            return f"{relative(path)} is no text in UTF-8; mend the file."
        if not isinstance(tree, dict | None):
            return f"{relative(path)}:1: it holds {tree!r:.40}, and should hold keys and their values; mend the file."
    return None


def joined(error: BaseException) -> str:
    """The message with the parts that Hydra and OmegaConf put on lines of their own, and its cause's."""
    words = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    lines = [line.strip() for word in words for line in word.splitlines()]
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(NOISE)))


def of_yaml(error: yaml.YAMLError) -> str:
    """File, line, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"a YAML file cannot be read: {joined(error)}"
    problem = str(getattr(error, "problem", None) or "it is no YAML")
    if "'\\t'" in problem:
        problem = "a tab; YAML is indented by spaces"
    elif "<stream end>" in problem:
        problem = "the file ends inside of a bracket or quote that is not closed"
    return f"{relative(mark.name)}:{mark.line + 1}: {problem}; mend the file."


def of_choice(error: MissingConfigException) -> str:
    """What there is to choose, without the bases that are no choice."""
    name = error.missing_cfg_file or ""
    group, _, choice = name.rpartition("/")
    if not group:
        return f"there is no config {name!r} in conf/; leave --config-name out."
    places = [] if any(choice in word for word in sys.argv[1:]) else written(rf"\b{re.escape(choice)}\b")
    there = shown(error.options or choices_of(group))
    close = get_close_matches(choice, there, n=1)
    asked = f"; did you mean {group}={close[0]}?" if close else "."
    place = f"{places[0]}: " if places else ""
    return f"{place}{group}={choice}: there is no conf/{group}/{choice}.yaml{asked} Choose one of {', '.join(there)}."


def of_system(error: OSError) -> str:
    """What the system would not do, and to which file."""
    if error.filename is None:
        return str(error)
    return f"{error.filename} cannot be written: {error.strerror}; choose another run_dir (or hydra.sweep.dir)."


def of_grammar(error: OverrideParseException) -> str:
    """An override that Hydra's grammar has no reading of: quoted, it is a text."""
    word = error.override
    key, _, value = word.partition("=")
    at = re.search(r"^( *)\^$", str(error), re.MULTILINE)
    place = len(at[1]) - len("LexerNoViableAltException: ") if at else -1
    mark = f" ({word[place]!r} is none of its characters)" if 0 <= place < len(word) else ""
    told = "" if mark else f" ({str(error).splitlines()[0].removeprefix('Error parsing override ')})"
    if value.count("'") % 2 or value.count('"') % 2:
        return f"{word}: a quote is not closed; the shell takes quotes away, so write \"{key}='...'\""
    if any(value.count(pair[0]) != value.count(pair[1]) for pair in ("[]", "{}", "()")):
        return f"{word}: a bracket is not closed; put the whole in quotes for the shell: '{key}=[a, b]'"
    return f"{word} cannot be read{mark or told}; put the value in quotes within quotes: {quoted_twice(key, value)}"


def of_composition(error: ConfigCompositionException) -> str:
    """A key that there is not, with the one that was meant; else what Hydra says."""
    said, cause = joined(error), error.__cause__
    if match := re.match(r"Could not override '([^']+)'\. No match in the defaults list", said):
        return f"{match[1]}: there is no such group{did_you_mean(match[1])}"
    if match := re.match(r"Could not override '([^']+)'", said):
        key = str(getattr(cause, "full_key", None) or match[1])
        if cause is not None and "is not in struct" in str(cause):
            key = match[1]
        return f"{match[1]}: there is no such key ({key.rpartition('.')[2]}){did_you_mean(match[1])}"
    if match := re.match(r"Could not append to config\. An item is already at '([^']+)'", said):
        return f"+{match[1]}: there is that key already; leave the + out."
    if match := re.match(r"Could not delete from config\. '([^']+)' does not exist", said):
        return f"~{match[1]}: there is no such key{did_you_mean(match[1])}"
    if match := re.match(r"Ambiguous value for argument '(.+?)' 1\.", said):
        key, _, value = match[1].partition("=")
        if takes_several(key):
            return f"{match[1]}: for several in one run write '{key}=[{value}]', for a run of each add -m"
        if key in groups():
            return f"{match[1]}: a run has one; for a run of each add -m"
        return (
            f"{match[1]} is several values; for a run of each add -m, for a list write '{key}=[{value}]', for one text "
            f"{quoted_twice(key, value)}"
        )
    if match := re.match(r"Sweep parameters '([^']+)' requires --multirun", said):
        return f"{match[1]} is several values, and so several runs; add -m, or put the value in quotes: \"'...'\""
    return of_files(error)


def quoted_twice(key: str, value: str) -> str:
    """A text in Hydra's quotes, as the shell hands them on."""
    return f"\"{key}='{value}'\""
