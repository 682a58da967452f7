"""Starts a run from weights that lie in files: each rank reads what it holds, whatever the strategy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import lightning.pytorch as pl

from launch.schema import ConfigError
from strategies.engines.checkpoint import Held, Holds, Reader
from strategies.engines.formats import load_weights, places
from strategies.weights import weights_of


class StartingWeights(pl.Callback):
    """Puts `model.weights` in the place of the initial weights; ConfigError at once if they are not the model's."""

    def __init__(self, path: Path, model: pl.LightningModule) -> None:
        shadow = copy.deepcopy(model)
        shadow.configure_model()
        self.source = weights_of(path)
        try:
            self.places = places(self.source.manifest, shadow)
        except ValueError as error:
            raise ConfigError(
                f"model.weights={path}: {error}; give weights of this model, or rename them by scripts/convert.py."
            ) from None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = cast(Holds, trainer.strategy)
        self.load(engine.held())
        engine.narrow()

    def load(self, held: Iterator[Held]) -> None:
        with Reader(*self.source) as reader:
            load_weights(reader, held, self.places)
