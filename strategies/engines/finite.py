"""Whether the losses and gradients of an optimizer step are numbers on every rank, and what becomes of it if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from models.steps import steps_done
from strategies.engines.loss_terms import LossTerms

NAN, INFINITE = 1.0, 2.0  # what a rank says of its loss; 0 of a number
WORDS = {NAN: "nan", INFINITE: "inf"}
SHOWN_RANKS = 8
FIRST_WORD = 4  # of the ranks', behind an amount and three numbers of what their losses weigh

GRADIENTS = "the gradients, though no loss, are nan or inf"


class StepGuard:
    """Ends the run before an optimizer step that NaN or infinity would reach, or has it left out, on all ranks alike.

    What the ranks must tell each other, of the weights of their losses, too, goes into one all-reduce of a number per
    rank and a few more.

    skips: whether such a step is left out (trainer.on_nan=skip).
    """

    def __init__(self) -> None:
        self.skips = False
        self.skipped_steps = 0
        self.loss: Tensor | None = None
        self.problem: str | None = None
        self.terms = LossTerms()
        self.has_warned = False  # that the terms are mixed

    def begin(self) -> None:
        """Begin another step, whatever became of the one before: its module may not have stepped at all."""
        self.loss = None
        self.terms.clear()

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch, of which this rank is to speak."""
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def agree(self, amount: Tensor) -> Tensor:
        """The sum of `amount` (scalar) over all ranks, whose losses are looked at on the way; collective.

        A sum that is no number is a problem of the gradients: give what is made of all of them.
        """
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        wide = torch.float32 if amount.device.type == "mps" else torch.float64
        shared = torch.zeros(FIRST_WORD + world_size, dtype=wide, device=amount.device)
        for place, part in enumerate((amount, self.terms.total, self.terms.share, self.terms.mixed)):
            shared[place] = part
        if self.loss is not None:
            shared[FIRST_WORD + rank] = NAN * self.loss.isnan() + INFINITE * self.loss.isinf()
        self.loss = None
        if world_size > 1:
            dist.all_reduce(shared)
        total, *of_losses = shared.tolist()
        weight, share, mixed = of_losses[: FIRST_WORD - 1]
        self.terms.settle(weight, share, is_mixed=mixed > 0)
        self.problem = problem_of(of_losses[FIRST_WORD - 1 :]) or (None if math.isfinite(total) else GRADIENTS)
        return shared[0].to(amount.dtype)

    def passes(self, trainer: pl.Trainer) -> bool:
        """Whether the optimizer may step; ValueError if the run is to end instead."""
        if self.terms.is_mixed and not self.has_warned and trainer.is_global_zero:
            print(
                "The loss adds up means over different numbers of targets, and is weighted by those of one: the result "
                "depends on how a batch is cut. Return the right number as num_targets; verify says how far off it is.",
                flush=True,
            )
            self.has_warned = True
        if self.problem is None:
            return True
        step, problem = steps_done(trainer) + 1, self.problem
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
