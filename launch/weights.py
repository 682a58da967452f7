"""Starts a run from weights that lie in files: each rank reads what it holds, whatever the strategy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import lightning.pytorch as pl

from launch.schema import ConfigError
from strategies.engines.checkpoint import Held, Holds, Reader
from strategies.engines.formats import load_weights, names_of, places
from strategies.fitting import Fitting, fitted, listed
from strategies.weights import weights_of

AS_IT_IS = Fitting()


class StartingWeights(pl.Callback):
    """Puts `model.weights` in the place of the initial weights; ConfigError at once if they are not the model's."""

    def __init__(self, path: Path, model: pl.LightningModule, fitting: Fitting = AS_IT_IS) -> None:
        shadow = copy.deepcopy(model)
        shadow.configure_model()
        self.path, (self.folder, manifest) = path, weights_of(path)
        try:
            self.manifest, self.ignored = fitted(manifest, fitting)
            self.places = places(self.manifest, shadow, fitting.may_lack)
        except ValueError as error:
            raise ConfigError(f"model.weights={path}: {error}.") from None
        self.names = list(names_of(shadow))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = cast(Holds, trainer.strategy)
        self.load(engine.held())
        engine.narrow()
        if trainer.is_global_zero:
            print(f"model.weights={self.path}: {self.told}")

    @property
    def told(self) -> str:
        """What of the weights is used, and what is not."""
        initial = [name for name in self.names if name not in self.places]
        kept = f"{len(initial)} keep their initial values{listed(initial)}" if initial else ""
        left = f"{len(self.ignored)} there are left out{listed(self.ignored)}" if self.ignored else ""
        return "; ".join(filter(None, [f"{len(self.places)} of {len(self.names)} tensors are from there", kept, left]))

    def load(self, held: Iterable[Held]) -> None:
        with Reader(self.folder, self.manifest) as reader:
            load_weights(reader, held, self.places)
