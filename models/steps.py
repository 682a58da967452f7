"""What a step is where steps are counted: a global batch that has been trained on, whatever the module steps in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def steps_done(trainer: Trainer) -> int:
    """How many global batches lie behind a trainer: its place in the data, and the name of its checkpoints.

    Lightning's `global_step` counts calls of `optimizer.step()`. A module that optimizes manually makes as many of them
    in a batch as it likes, a GAN two; of any other it is the same number.
    """
    module = trainer.lightning_module
    if module is None or module.automatic_optimization:
        return trainer.global_step
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)
