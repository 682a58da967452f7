"""Hydra's composed config as one plain tree, the same for train.py, verify and workers of a foreign launcher."""

import os
import re
from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from datamodules.refused import RefusedError
from datamodules.tokenizers import vocab_size
from launch.keys import CONFIG_DIR, is_key, listed_choices, written
from launch.schema import ConfigError
from launch.typed import spelled
from launch.wording import broken_file

REPOSITORY = CONFIG_DIR.parent

OmegaConf.register_new_resolver("vocab_size", vocab_size, replace=True)
OmegaConf.register_new_resolver("choices", listed_choices, replace=True)  # of --help


def tree_of(config: DictConfig, hydra: Any) -> dict[str, Any]:
    """The task's config with every interpolation resolved, plus `choices`: the file chosen in each group."""
    choices = {group: choice for group, choice in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(unresolved(error, choices)) from None
    assert isinstance(tree, dict)
    found = {str(key): at_home(value) for key, value in tree.items()}
    check_typed(found, [str(word) for word in hydra.overrides.task])
    return {**found, "choices": choices}


def at_home(value: Any) -> Any:
    """A value in which paths below ~ are the folders that they stand for."""
    if isinstance(value, dict):
        return {key: at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [at_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value  # noqa: PTH111


def check_typed(tree: dict[str, Any], words: Sequence[str]) -> None:
    """ConfigError for what somebody has typed that has no effect; by default it may be so, in a short run."""
    warmup, steps = tree.get("scheduler", {}).get("warmup_steps"), tree.get("trainer", {}).get("max_steps")
    typed = any(word.lstrip("+").startswith("scheduler.warmup_steps=") for word in words)
    if typed and isinstance(warmup, int) and isinstance(steps, int) and warmup > steps > 0:
        raise ConfigError(
            f"scheduler.warmup_steps={warmup} end behind trainer.max_steps={steps}, so that optimizer.lr is never "
            f"reached; set scheduler.warmup_steps={steps // 10}, or raise trainer.max_steps."
        )


def unresolved(error: OmegaConfBaseException, choices: dict[str, str | None]) -> str:
    """One line for a key that has no value: what to give, or which choices do not fit each other."""
    reason, key = str(error).splitlines()[0], str(error.full_key or "config")
    if isinstance(error.__cause__, RefusedError):
        return str(error.__cause__)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give {key}=..."
    group, wanted = key.partition(".")[0], re.search(r"Interpolation key '(.+?)'", reason)
    if wanted and not is_key(wanted[1]) and (places := written(re.escape("${" + wanted[1]))):
        return f"{places[0]}: {reason}; mend what stands in ${{...}}."
    if isinstance(error, InterpolationKeyError) and group in choices:
        return f"{key}: {reason}; {group}={choices[group]} does not go with data={choices['data']}, choose another."
    return broken_file() or f"{key}: {reason}"


def compose(overrides: list[str]) -> dict[str, Any]:
    """The tree of one run from overrides as the command line takes them, outside of a Hydra application."""
    return tree_of(*composed(overrides))


def composed(overrides: list[str]) -> tuple[DictConfig, Any]:
    """The task's config, interpolations unresolved, and Hydra's own."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        whole = hydra_compose("config", overrides=spelled(overrides), return_hydra_config=True)
    OmegaConf.set_struct(whole, False)
    hydra = whole.pop("hydra")
    whole.pop("resume_sweep")
    return whole, hydra
