"""From which weights a run starts: what `model.weights` means, and whether it is whole. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from launch.schema import AUTO, ConfigError, RunConfig, build_spec
from strategies.spec import Strategy
from strategies.weights import check_weights, find_weights


def check_one_start(config: RunConfig) -> None:
    """ConfigError if a run is to go on from a checkpoint, and to start from weights."""
    if config.weights is not None and config.resume not in (None, AUTO):
        raise ConfigError(
            f"model.weights={config.weights} and resume={config.resume}: a run that goes on has its weights; leave one "
            f"of them out."
        )


def resolve_weights(config: RunConfig) -> RunConfig:
    """The config with the very file or folder that `model.weights` means; ConfigError if none is there, or whole."""
    if config.weights is None:
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
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.weights={config.weights}: {error}") from None
    return config.model_copy(update={"weights": str(path)})
