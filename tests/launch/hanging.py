"""Models of which one rank stops for good, each at another place; and some that are merely slow."""

import os
import time
from typing import Any

from torch import Tensor

from models.language import LanguageModel

STEPS_BEFORE = 2
HANGING_RANK = 1


class HangsInTraining(LanguageModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == HANGING_RANK and self.trainer.global_step == STEPS_BEFORE:
            time.sleep(3600)
        return super().training_step(batch, batch_idx)


class HangsInValidation(LanguageModel):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == HANGING_RANK:
            time.sleep(3600)
        super().validation_step(batch, batch_idx)


class HangsInSetUp(LanguageModel):
    def configure_optimizers(self) -> Any:
        if self.global_rank == HANGING_RANK:
            time.sleep(3600)
        return super().configure_optimizers()


class IsSlow(LanguageModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(float(os.environ["STEP_S"]))
        return super().training_step(batch, batch_idx)


class StartsSlowly(LanguageModel):
    """One rank takes its time to end its first step, for which the others wait in their second; then all are slow."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step >= STEPS_BEFORE:
            time.sleep(float(os.environ["STEP_S"]))
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        is_first = self.trainer.global_step == 0
        super().optimizer_step(*args, **kwargs)
        if is_first and self.global_rank == HANGING_RANK:
            time.sleep(float(os.environ["FIRST_STEP_S"]))
