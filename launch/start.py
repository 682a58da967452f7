"""From which weights a run starts: what `model.weights` means, and whether it is whole. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from launch.schema import AUTO, WEIGHTS, ConfigError, RunConfig, build_spec
from strategies.fitting import fitted
from strategies.spec import Strategy
from strategies.weights import check_weights, find_weights, weights_of


def check_one_start(config: RunConfig) -> None:
    """ConfigError if a run is to go on from a checkpoint, and to start from weights."""
    if config.weights is not None and config.resume not in (None, AUTO):
        raise ConfigError(
            f"model.weights={config.weights} and resume={config.resume}: a run that goes on has its weights; leave one "
            f"of them out."
        )


def check_weights_there(config: RunConfig) -> None:
    """ConfigError if nothing lies where `model.weights` says."""
    assert config.weights is not None
    try:
        find_weights(Path(config.weights).expanduser().resolve())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.weights={config.weights}: {error}") from None


def resolve_weights(config: RunConfig) -> RunConfig:
    """The config with the very file or folder that `model.weights` means; ConfigError if none is there, or whole."""
    if config.weights is None:
        key = next((key for key in WEIGHTS[1:] if getattr(config, key)), None)
        if key is not None:
            raise ConfigError(f"model.{key}={getattr(config, key)}: there are no model.weights; leave it out.")
        return config
    strategy: Strategy = build_spec(config.strategy, "strategy", Strategy)
    if strategy.unsaved:
        raise ConfigError(
            f"model.weights={config.weights} cannot be put into {strategy.unsaved}, which strategy={strategy.name} "
            f"has; choose strategy=zero3_offload."
        )
    try:
        path = find_weights(Path(config.weights).expanduser().resolve())
        check_weights(path)
        fitted(weights_of(path).manifest, config.fitting)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.weights={config.weights}: {error}") from None
    return config.model_copy(update={"weights": str(path)})
