"""callbacks=ema: a moving average of the weights, under every engine.

It lies beside what the optimizer keeps of each parameter, in the same layout. So whatever shards, saves and resumes an
optimizer's state does so to the average, too, and any strategy goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from strategies.checkpoint import AVERAGE
from strategies.engines.checkpoint import Holds


@final
class EMA(pl.Callback):
    """Averages weights after every optimizer step: average = decay * average + (1 - decay) * weight.

    It begins as the weight behind the first step, as in Lightning's EMAWeightAveraging. It is kept in float32 at least:
    in bfloat16, what a step adds to it would be rounded away. Validation is of the weights themselves, and buffers
    are not averaged; scripts/convert.py --weights ema writes it.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must be a number in [0, 1) (got {decay!r}).")
        self.decay = decay
        self.stepped: dict[int, Tensor] = {}  # by id, what the optimizer has been seen to step
        self.before: dict[int, Tensor] = {}  # in a step: weights that have not been stepped yet, though others have
        self.trains = False  # until then steps are tries, by which an optimizer makes the state that is to be loaded

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise ValueError(
                f"callbacks=ema averages behind the steps of one optimizer, and {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)}, or optimizes manually; leave callbacks=ema out."
            )
        self.optimizer = cast(Holds, trainer.strategy).stepping
        self.step = trainer.global_step
        self.optimizer.register_step_pre_hook(self.keep)
        self.optimizer.register_step_post_hook(self.note)

    def state_dict(self) -> dict[str, Any]:
        """So that a checkpoint tells that there is one."""
        return {"decay": self.decay}

    def keep(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step, or a part of one: DeepSpeed steps its groups one after the other.

        Lightning runs forward and backward inside of a step: what it will step is not known yet.
        """
        if self.trains and self.step:
            fresh = (one for one in trained_by(optimizer) if id(one) not in self.stepped)
            self.before = {id(one): wide(one) for one in fresh}

    def note(self, optimizer: Optimizer, *_: Any) -> None:
        """Behind it. A try makes room for an average to be loaded, which stays without a number where there is none."""
        for tensor in trained_by(optimizer):
            if tensor.grad is not None:
                first = self.before.pop(id(tensor), None)
                self.stepped[id(tensor)] = tensor
                if not self.trains:
                    optimizer.state[tensor][AVERAGE] = torch.full_like(wide(tensor), torch.nan)
                elif first is not None:
                    optimizer.state[tensor][AVERAGE] = first
        self.before = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was not loaded begins as the weight: of a run that had no average, or of what it had not stepped."""
        self.trains, self.step = True, trainer.global_step
        self.stepped = {key: one for key, one in self.stepped.items() if AVERAGE in self.optimizer.state.get(one, {})}
        for tensor in self.stepped.values():
            average = self.optimizer.state[tensor][AVERAGE]
            average.copy_(torch.where(average.isnan(), wide(tensor), average))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Not in the optimizer's own hook: behind it, engines take back what they have stepped for no loss."""
        if trainer.global_step == self.step:
            return  # in the midst of a step
        self.step = trainer.global_step
        state = self.optimizer.state
        fresh = [one for one in self.stepped.values() if AVERAGE not in state[one]]
        known = [one for one in self.stepped.values() if AVERAGE in state[one]]
        for tensor in fresh:  # in the run's first step
            state[tensor][AVERAGE] = wide(tensor)
        if known:
            averages = [state[tensor][AVERAGE] for tensor in known]
            weights = [tensor.detach().to(one.dtype) for tensor, one in zip(known, averages, strict=True)]
            torch._foreach_lerp_(averages, weights, 1 - self.decay)


def trained_by(optimizer: Optimizer) -> Iterator[Tensor]:
    return (tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.requires_grad)


def wide(tensor: Tensor) -> Tensor:
    """A copy with at least float32's bits."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
