"""What a command line may name: groups, their choices, and keys, read from conf/ without composing it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"

# What others call a key of ours; of Lightning's Trainer, torchrun, Hugging Face's arguments.
ELSEWHERE = {
    "accumulate_grad_batches": "data.global_batch_size and data.micro_batch_size, from which it follows",
    "gradient_accumulation_steps": "data.global_batch_size and data.micro_batch_size, from which it follows",
    "batch_size": "data.global_batch_size",
    "per_device_train_batch_size": "data.micro_batch_size",
    "block_size": "data.sequence_length",
    "context_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "ckpt_path": "resume",
    "resume_from_checkpoint": "resume",
    "epochs": "trainer.max_steps",
    "max_epochs": "trainer.max_steps",
    "num_steps": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "val_check_interval": "trainer.val_every_steps",
    "log_every_n_steps": "trainer.log_every_steps",
    "grad_clip": "trainer.clip_norm",
    "gradient_clip_val": "trainer.clip_norm",
    "max_grad_norm": "trainer.clip_norm",
    "gpus": "launcher.devices",
    "num_gpus": "launcher.devices",
    "nproc_per_node": "launcher.devices",
    "num_processes": "launcher.devices",
    "world_size": "launcher.devices",
    "learning_rate": "optimizer.lr",
    "output_dir": "run_dir",
    "default_root_dir": "run_dir",
    "out_dir": "run_dir",
    "dtype": "precision",
    "n_head": "model.net.num_heads",
    "n_heads": "model.net.num_heads",
    "n_layer": "model.net.num_layers",
    "n_layers": "model.net.num_layers",
    "n_embd": "model.net.hidden_size",
    "d_model": "model.net.hidden_size",
    "hidden_dim": "model.net.hidden_size",
    "wandb": "logger",
}


def load(path: Path) -> Any:
    """What a YAML file holds; YAMLError names it, its line and what is wrong."""
    with path.open(encoding="utf-8") as file:
        return yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def groups() -> tuple[str, ...]:
    """The axes on which there is something to choose."""
    return tuple(sorted(folder.name for folder in CONFIG_DIR.iterdir() if folder.is_dir()))


def shown(choices: Iterable[str]) -> list[str]:
    """Those that are for users: bases begin with an underscore."""
    return [choice for choice in choices if not choice.rpartition("/")[2].startswith("_")]


def choices_of(group: str) -> list[str]:
    return shown(sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")))


def listed_choices() -> str:
    """Every group, and what there is to choose in it."""
    return "\n".join(f"{group}: {', '.join(choices_of(group))}" for group in groups())


@cache
def defaults() -> dict[str, Any]:
    """What is chosen in each group unless somebody says something else."""
    entries = load(CONFIG_DIR / "config.yaml")["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def none_of(group: str) -> str | None:
    """How to choose nothing in a group; None where something must be."""
    return {"None": "null", "[]": "[]"}.get(str(defaults().get(group, "")))


def takes_several(group: str) -> bool:
    """Whether a run may have more than one of a group, as a list."""
    return isinstance(defaults().get(group), list)


@cache
def known_keys() -> dict[str, bool]:
    """Every key of the composed config, whichever choices it is composed of; and whether it follows from another."""
    found = dict.fromkeys(groups(), False)
    for path in [*CONFIG_DIR.glob("*.yaml"), *CONFIG_DIR.glob("*/*.yaml")]:
        group = "" if path.parent == CONFIG_DIR else path.parent.name
        tree = None if group == "recipe" or path.stem == "wandb_sweep" else load(path)
        if isinstance(tree, dict):
            prefix = "model." if path.stem == "_weights" else f"{group}." if group else ""
            found |= dotted(tree, prefix)
    return {key: follows for key, follows in found.items() if not key.startswith(("hydra", "resume_sweep"))}


def dotted(tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, bool]]:
    """The keys of a nested mapping that a user may give, each with the sections that it is in."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name == "defaults" or (str(name).startswith("_") and name != "_target_"):
            continue
        yield key, "${" in str(value)
        if isinstance(value, dict):
            yield from dotted(value, f"{key}.")


def is_key(key: str) -> bool:
    return key in known_keys()


def meant(key: str) -> str | None:
    """The key that somebody means who gives one that there is not: by its last part, what others call it, its look."""
    keys = sorted(known_keys().keys() - {key})  # a mistyped one may stand in a file
    key = key.lower().replace("-", "_").replace("/", ".")
    section, _, last = key.rpartition(".")
    same = [known for known in keys if known.rpartition(".")[2] == last]
    if same:
        return max(same, key=lambda one: (one.startswith(f"{section}."), not known_keys()[one], -one.count(".")))
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    if close := get_close_matches(key, keys, n=1, cutoff=0.75):
        return close[0]
    lasts: dict[str, str] = {}
    for known in keys:  # the one in the section that was named, if there are several
        if known.startswith(f"{section}.") or known.rpartition(".")[2] not in lasts:
            lasts[known.rpartition(".")[2]] = known
    close = get_close_matches(last, lasts, n=1, cutoff=0.75)
    return lasts[close[0]] if close else None


def did_you_mean(key: str) -> str:
    """`; did you mean trainer.max_steps?`, or what to do where nothing is like it; and where it stands in a file."""
    known, last = meant(key), key.rpartition(".")[2]
    places = written(rf"^\s*{re.escape(last)}\s*:") if not known or known.rpartition(".")[2] != last else []
    place = f" ({places[0]})" if len(places) == 1 else ""
    return f"{place}; did you mean {known}?" if known else f"{place}; `python train.py --help` shows every key."


def written(pattern: str) -> list[str]:
    """Where in the YAML files a pattern stands: files and lines."""
    found = []
    for path in yaml_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{relative(path)}:{number}")
    return found


def yaml_files() -> list[Path]:
    """Files that a config may be composed of, the chosen ones first, also in a folder that the command line adds."""
    folders = [CONFIG_DIR]
    for flag, folder in pairwise(sys.argv):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(folder))
    for word in sys.argv:
        if word.startswith("hydra.searchpath="):
            folders += map(Path, re.findall(r"(?:file://|(?<=[\[,=' ]))(/[^,\]']+)", word))
    every = [path for folder in folders for pattern in ("*.yaml", "*/*.yaml") for path in sorted(folder.glob(pattern))]
    words = [word.rpartition("=")[2] for word in sys.argv]
    return sorted(dict.fromkeys(path.resolve() for path in every), key=lambda path: path.stem not in words)


def relative(path: str | Path) -> str:
    """A path as somebody who stands in the working directory, or in the repository, would write it."""
    resolved = Path(path).resolve()
    for root in (Path.cwd(), CONFIG_DIR.parent):
        if resolved.is_relative_to(root):
            return str(resolved.relative_to(root))
    return str(path)
