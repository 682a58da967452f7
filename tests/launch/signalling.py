"""Models that have their own run signalled, from within a step or a validation."""

import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.signals import asked_path
from models.language import LanguageModel
from tests.launch.command import wait_for
from tracking.status import read_status

AFTER_STEPS = 5


class EndsInAStep(LanguageModel):
    """SIGTERM arrives in the midst of the step that follows AFTER_STEPS."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == AFTER_STEPS and self.trainer.is_global_zero:
            end(Path(self.trainer.default_root_dir), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


class EndsInValidation(LanguageModel):
    """SIGUSR1 arrives in the first batch of a validation after AFTER_STEPS, which is not finished then."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == AFTER_STEPS and self.trainer.is_global_zero and batch_idx == 0:
            end(Path(self.trainer.default_root_dir), signal.SIGUSR1)
        super().validation_step(batch, batch_idx)


def end(run_dir: Path, number: signal.Signals) -> None:
    """Signal a run's dispatcher, once: a run that goes on is left alone."""
    if (run_dir / "attempts").exists() or asked_path(run_dir).exists():
        return
    status = read_status(run_dir)
    assert status is not None
    assert status.dispatcher is not None
    os.kill(status.dispatcher[1], number)
    wait_for(asked_path(run_dir).exists, "the dispatcher")  # or the run might be over before it hears
