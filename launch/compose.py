"""Hydra's composed config as one plain tree, the same for train.py, verify and workers of a foreign launcher."""

from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from datamodules.tokenizers import vocab_size
from launch.schema import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG_DIR = REPOSITORY / "conf"

OmegaConf.register_new_resolver("vocab_size", vocab_size, replace=True)


def quoted(value: object) -> str:
    """A value as an override takes it, whatever characters it holds."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def spelled(overrides: list[str]) -> list[str]:
    """`debug=nan` as the name of a choice: Hydra would take it for a number."""
    return ["debug='nan'" if word == "debug=nan" else word for word in overrides]


def tree_of(config: DictConfig, hydra: Any) -> dict[str, Any]:
    """The task's config with every interpolation resolved, plus `choices`: the file chosen in each group."""
    choices = {group: choice for group, choice in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(unresolved(error, choices)) from None
    assert isinstance(tree, dict)
    return {**{str(key): value for key, value in tree.items()}, "choices": choices}


def unresolved(error: OmegaConfBaseException, choices: dict[str, str | None]) -> str:
    """One line for a key that has no value: what to give, or which choices do not fit each other."""
    reason, key = str(error).splitlines()[0], str(error.full_key or "config")
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give {key}=..."
    group = key.partition(".")[0]
    if isinstance(error, InterpolationKeyError) and group in choices:
        return f"{key}: {reason}; {group}={choices[group]} does not go with data={choices['data']}, choose another."
    return f"{key}: {reason}"


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
