"""Models that break on one rank, each in a way of its own."""

import os
import signal
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.language import LanguageModel
from models.plan import ParallelPlan


class RaisesOnRank1(LanguageModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            raise ValueError("boom on rank 1")  # as is a mistake in a config, too
        return super().training_step(batch, batch_idx)


class RaisesAtStart(LanguageModel):
    """A model that has the right weights, and comes to no step."""

    def on_fit_start(self) -> None:
        raise RuntimeError("boom at the start")


class SegfaultsOnRank1(LanguageModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().training_step(batch, batch_idx)


class AbortsOnRank1(LanguageModel):
    """Ends as C++ does by an exception that nobody catches, as one in a thread of a library."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            os.write(2, b"terminate called after throwing an instance of 'Boom'\n  what():  sizes do not match\n")
            os.kill(os.getpid(), signal.SIGABRT)
        return super().training_step(batch, batch_idx)


class HoldsNoReset(LanguageModel):
    """A net with a parameter that nothing initialises."""

    def configure_model(self) -> None:
        import torch

        super().configure_model()
        self.lonely = torch.nn.Parameter(torch.empty(3, device="meta"))


class CannotBeSplit(LanguageModel):
    """A model that says where it may be cut, and not how its matrices may be split."""

    @property
    def plan(self) -> ParallelPlan:
        return replace(super().plan, tensor={})


class DependsOnRank(LanguageModel):
    """A model that one process cannot imitate: each rank weighs its loss by its number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.global_rank)
