"""Composing a case's config in a tenth of the time: files that the same choices name are read and merged once."""

import copy
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from launch.compose import CONFIG_DIR, compose, composed, tree_of


def compose_fast(overrides: list[str]) -> dict[str, Any]:
    """What `compose` gives (a test compares them), in which Hydra spends a quarter of a second."""
    if any(word.startswith(("+", "~")) for word in overrides):
        return compose(overrides)
    choices = [word for word in overrides if (CONFIG_DIR / word.partition("=")[0]).is_dir()]
    kept, hydra = merged(*choices)
    config = copy.deepcopy(kept)
    OmegaConf.set_struct(config, True)  # a key that is not there is a mistake
    for word in overrides:
        if word not in choices:
            key, value = parsed(word)
            OmegaConf.update(config, key, value)
    return tree_of(config, hydra)


@cache
def merged(*choices: str) -> tuple[DictConfig, Any]:
    return composed(list(choices))


@cache
def parsed(word: str) -> tuple[str, Any]:
    (override,) = OverridesParser.create().parse_overrides([word])
    return override.get_key_element(), override.value()
