"""Learning-rate schedules, as factors on the optimizer's lr per optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from models.refused import RefusedError


def constant(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Rise linearly over `warmup_steps` to the full rate, then stay; step 0 already learns."""
    _check_warmup(warmup_steps)

    def factor(step: int) -> float:
        return _warmup(step, warmup_steps)

    return LambdaLR(optimizer, factor)


def cosine(optimizer: Optimizer, *, warmup_steps: int, max_steps: int, final_fraction: float) -> LambdaLR:
    """Rise linearly over `warmup_steps`, then fall along a half cosine (Loshchilov and Hutter 2016, eq. 5).

    The last step, max_steps - 1, is taken at `final_fraction` of the full rate. A run that is shorter than its warm-up
    ends in it.
    """
    _check_warmup(warmup_steps)
    if not 0 <= final_fraction <= 1:
        raise RefusedError(f"scheduler.final_fraction={final_fraction} is no fraction; give a number from 0 to 1.")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return _warmup(step, warmup_steps)
        done = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
        return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup_steps))


def _check_warmup(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise RefusedError(f"scheduler.warmup_steps={warmup_steps} is negative; give 0 for no warm-up, or more.")
