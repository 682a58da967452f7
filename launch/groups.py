"""How a run's optimizer was when it was made: what has changed in its groups since, it has counted, and is saved."""

from __future__ import annotations

from typing import cast

import lightning.pytorch as pl
from torch.optim import Optimizer

from models.steps import steps_done
from strategies.engines import groups
from strategies.engines.checkpoint import Holds

LOOKS = 5  # steps in which an optimizer that keeps something has begun to: the first may be left out as overflows


class Start(pl.Callback):
    """The groups of the optimizer as `configure_optimizers` has made them.

    Put it before what puts a run that goes on where it was.
    """

    settings: list[groups.Settings]
    step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) == 1:
            self.settings = groups.settings_of(cast(Holds, trainer.strategy).stepping)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = steps_done(trainer)

    def unkept(self, optimizer: Optimizer) -> str | None:
        """What of the groups cannot be saved, though it changes; None if there is nothing."""
        try:
            groups.moved(optimizer, self.settings)
        except ValueError as error:
            return str(error)
        return None
