"""Lightning's loops with `max_steps` counted in global batches, for modules that optimize manually.

Lightning counts calls of `optimizer.step()`: it would end a GAN's run, which makes two in a batch, half-way through its
samples, and one that never steps not at all.
"""

from __future__ import annotations

from typing import final

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from models.steps import steps_done


def end_by_batches(trainer: Trainer) -> None:
    """Let a trainer that has not begun to fit end behind `max_steps` global batches."""
    before = trainer.fit_loop
    trainer.fit_loop = Epochs(trainer, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
    trainer.fit_loop.epoch_loop = Batches(trainer, min_steps=before.min_steps, max_steps=before.max_steps)


@final
class Epochs(_FitLoop):
    @property
    def done(self) -> bool:
        if self.max_batches == 0 or steps_done(self.trainer) >= self.max_steps:
            return True
        return self.trainer.should_stop and self._can_stop_early


@final
class Batches(_TrainingEpochLoop):
    @property
    def _is_training_done(self) -> bool:
        return steps_done(self.trainer) >= self.max_steps or self._num_ready_batches_reached()
