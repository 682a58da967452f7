"""Task: what the LightningModules here share, so that each states only its loss."""

from abc import ABC
from collections.abc import Callable
from typing import cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.optimize import configure
from models.plan import ParallelPlan


class Task(LightningModule, ABC):
    """A net on the meta device, its plan and its optimizer; `training_step` and `validation_step` are the subclass's.

    `training_step` returns the loss and logs nothing: the tracker logs `train/loss` from what is returned, once per
    optimizer step, where a `self.log` would cost about 1 ms per micro-batch.
    """

    def __init__(
        self,
        *,
        net: Callable[..., nn.Module],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
    ) -> None:
        super().__init__()
        self._make_net = net
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    def configure_model(self) -> None:
        """Build the net on the meta device, once; its weights are the strategy's to make."""
        if "net" not in dict(self.named_children()):
            with torch.device("meta"):
                self.net = self.make_net()

    def make_net(self) -> nn.Module:
        """The net, with what it is to know of its task."""
        return self._make_net()

    @property
    def plan(self) -> ParallelPlan:
        """The net's plan; there is one once `configure_model` has run."""
        return cast(ParallelPlan, self.net.plan)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self._make_optimizer, self._make_scheduler)
