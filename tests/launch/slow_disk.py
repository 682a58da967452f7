"""Models of runs whose checkpoints take their time to be written; tensors come one by one."""

import time
from typing import Any

from torch import Tensor

from models.language import LanguageModel
from strategies.engines import checkpoint

SAVED_STEP = 2
WRITE_S = 6.0

bytes_of = checkpoint.bytes_of


class WritesSlowly(LanguageModel):
    def on_fit_start(self) -> None:
        pause_s = WRITE_S / (3 * len(list(self.parameters())))  # AdamW keeps two more of each

        def slowly(tensor: Tensor) -> Any:
            time.sleep(pause_s)
            return bytes_of(tensor)

        checkpoint.bytes_of = slowly


class RaisesWhileItSaves(WritesSlowly):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and self.trainer.global_step == SAVED_STEP:
            raise RuntimeError("boom after a save has begun")
        return super().training_step(batch, batch_idx)
