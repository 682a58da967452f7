"""Whether the losses and gradients of an optimizer step are numbers on every rank, and what becomes of it if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

NAN, INFINITE = 1.0, 2.0  # what a rank says of its loss; 0 of a number
WORDS = {NAN: "nan", INFINITE: "inf"}
SHOWN_RANKS = 8

GRADIENTS = "the gradients, though no loss, are nan or inf"


class StepGuard:
    """Ends the run before an optimizer step that NaN or infinity would reach, or has it left out, on all ranks alike.

    What the ranks must tell each other goes into one all-reduce of a number per rank.

    skips: whether such a step is left out (trainer.on_nan=skip).
    """

    def __init__(self) -> None:
        self.skips = False
        self.skipped_steps = 0
        self.loss: Tensor | None = None
        self.problem: str | None = None

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch, of which this rank is to speak."""
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def agree(self, amount: Tensor) -> Tensor:
        """The sum of `amount` (scalar) over all ranks, whose losses are looked at on the way; collective.

        A sum that is no number is a problem of the gradients: give what is made of all of them.
        """
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        shared = amount.new_zeros(1 + world_size)
        shared[0] = amount
        if self.loss is not None:
            shared[1 + rank] = NAN * self.loss.isnan() + INFINITE * self.loss.isinf()
        self.loss = None
        if world_size > 1:
            dist.all_reduce(shared)
        total, *words = shared.tolist()
        self.problem = problem_of(words) or (None if math.isfinite(total) else GRADIENTS)
        return shared[0]

    def passes(self, trainer: pl.Trainer) -> bool:
        """Whether the optimizer may step; ValueError if the run is to end instead."""
        if self.problem is None:
            return True
        step, problem = trainer.global_step + 1, self.problem
        self.problem = None
        if not self.skips:
            raise ValueError(
                f"trainer.on_nan=stop: {problem} in optimizer step {step} (of {trainer.max_steps}); lower "
                f"optimizer.lr, look at that step's samples, or set trainer.on_nan=skip."
            )
        self.skipped_steps += 1
        if trainer.is_global_zero:
            print(f"step {step}/{trainer.max_steps}  is skipped: {problem}", flush=True)
        return False


def problem_of(words: Sequence[float]) -> str | None:
    """What the ranks say of their losses, in words: `the loss of rank 1 is nan`."""
    ranks: dict[float, list[int]] = {}
    for rank, word in enumerate(words):
        if word:
            ranks.setdefault(word, []).append(rank)
    if not ranks:
        return None
    return " and ".join(
        f"the loss of {'ranks' if those[1:] else 'rank'} {', '.join(map(str, those[:SHOWN_RANKS]))}"
        f"{' and others' if those[SHOWN_RANKS:] else ''} is {WORDS[word]}"
        for word, those in ranks.items()
    )


def leave_out_when(wanted: Callable[[], bool], optimizer: Any) -> None:
    """Have DeepSpeed's optimizer leave out a step also where it finds nothing wrong with the gradients.

    It updates its loss scale once it has decided, and looks at `overflow` once more after that.
    """
    update_scale = optimizer._update_scale

    def decide(has_overflow: bool) -> None:
        optimizer.overflow = has_overflow or wanted()
        update_scale(optimizer.overflow)

    optimizer._update_scale = decide


class ChecksSteps(Strategy):
    """Mixed into engines whose optimizer is torch's own: asks the guard once gradients are whole, before clipping.

    A step is left out by letting go of its gradients: torch's optimizers touch neither weight nor state without one.
    """

    guard: StepGuard
    norm: Tensor | None = None  # that the guard has looked at, while it is used for clipping

    def agreed_norm(self, optimizer: Optimizer) -> Tensor:
        """L2 norm of the whole model's gradient, which the guard has looked at; collective."""
        raise NotImplementedError

    def scale_to(self, max_norm: float, norm: Tensor, optimizer: Optimizer) -> None:
        """Scale the gradients, which have this norm, so that it is at most `max_norm`."""
        raise NotImplementedError

    def connect_guard(self) -> None:
        """Have the precision plugin, which calls what comes between backward and step, ask the guard.

        A module that optimizes manually steps when it likes, and is not asked.
        """
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:
            return
        plugin = self.precision_plugin
        clip_gradients = plugin._clip_gradients

        def check_and_clip(module: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            norm = self.agreed_norm(optimizer)
            if self.guard.passes(module.trainer):
                # What a module does to its gradients before it clips them changes their norm.
                self.norm = None if is_overridden("configure_gradient_clipping", module, pl.LightningModule) else norm
                clip_gradients(module, optimizer, *args, **kwargs)
                self.norm = None
            else:
                for group in optimizer.param_groups:
                    for stepped in group["params"]:
                        stepped.grad = None

        def clip_by_norm(optimizer: Optimizer, max_norm: float) -> None:
            self.scale_to(max_norm, self.agreed_norm(optimizer) if self.norm is None else self.norm, optimizer)

        plugin._clip_gradients = check_and_clip  # type: ignore[method-assign,assignment]
        plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign,assignment]
