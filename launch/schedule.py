"""A schedule's state in a checkpoint: what is kept of it, what cannot be, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from types import FunctionType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, SequentialLR

RATES, BASES, PARTS, LAMBDAS, MOMENTA = "_last_lr", "base_lrs", "_schedulers", "lr_lambdas", "momenta"
MOVED = ("betas", "momentum")  # settings of an optimizer's groups that schedules move beside the rate
# What torch's schedules keep in types of their own, and never change: it is in the config at hand.
SETTINGS = ("milestones", "_schedule_phases")


def plain(scheduler: LRScheduler) -> dict[str, Any]:
    """A schedule's state as far as JSON knows it, with base rates and what else it moves of the optimizer."""
    state = scheduler.state_dict()
    kept = {key: deepcopy(value) for key, value in state.items() if key != PARTS and is_json(value)}
    kept[BASES] = bases_of(scheduler)
    if parts_of(scheduler):
        kept[PARTS] = [plain(part) for part in parts_of(scheduler)]
    if moves_momenta(scheduler):
        kept[MOMENTA] = [{key: group[key] for key in MOVED if key in group} for group in groups_of(scheduler)]
    return kept


def unkept(config: LRSchedulerConfig, trainer: pl.Trainer) -> str | None:
    """What of a schedule a run that goes on would not have again; None where there is nothing."""
    batches = trainer.val_check_interval
    monitor = str(config.monitor)
    is_validated = monitor.startswith("val/") and config.frequency % batches == 0
    if config.reduce_on_plateau and config.interval == "step" and not is_validated:
        return (
            f"{type(config.scheduler).__name__} looks at {monitor} every {config.frequency} batches, and a run that "
            f"goes on has only what it validates; give monitor=val/loss, frequency={batches}."
        )
    return unknown(config.scheduler)


def unknown(scheduler: LRScheduler) -> str | None:
    """The first thing in a schedule's state that JSON does not know, nor the config at hand; None if there is none."""
    for key, value in scheduler.state_dict().items():
        if key in (PARTS, *(SETTINGS if is_torchs(scheduler) else ())):
            continue
        if not is_json(value) and not isinstance(value, FunctionType | partial | type):
            return (
                f"{type(scheduler).__name__}.{key} is {type(value).__name__}, and of a schedule only numbers, text, "
                f"lists and dicts of them are kept; keep it in such."
            )
    return next(filter(None, map(unknown, parts_of(scheduler))), None)


def restore_schedule(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put a schedule, and its optimizer's rates, where they were; base rates are those of the config at hand."""
    load_counts(scheduler, state)
    rates: list[float | Tensor]
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    elif BASES not in state:
        raise ValueError(
            f"resume: the checkpoint was written when of {type(scheduler).__name__} no base rates were kept; start "
            f"from its weights by model.weights."
        )
    else:
        rates = rates_of(scheduler, state[RATES], state[BASES])
    scheduler._last_lr = rates
    for group, rate in zip(groups_of(scheduler), rates, strict=True):
        group["lr"] = rate
    if MOMENTA in state:
        momenta = by_group(scheduler, state[MOMENTA])
        for group, moved in zip(groups_of(scheduler), momenta, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in moved.items()})


def load_counts(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put back what a schedule, and each that it is made of, has counted; lists in torch's own are settings."""
    parts, kept = parts_of(scheduler), state.get(PARTS, [])
    if len(parts) != len(kept):
        raise ValueError(
            f"resume: {type(scheduler).__name__} is made of {len(parts)} schedules, and the checkpoint has the state "
            f"of {len(kept)} such; give the schedule that wrote it."
        )
    apart = (RATES, BASES, PARTS, LAMBDAS, MOMENTA)
    counts = {
        key: value
        for key, value in state.items()
        if key not in apart and not (is_torchs(scheduler) and isinstance(value, list | dict))
    }
    own = scheduler.state_dict()
    if any(state.get(LAMBDAS, [])) and LAMBDAS in own:
        counts[LAMBDAS] = by_group(scheduler, state[LAMBDAS])
    scheduler.load_state_dict({**own, **counts})
    for part, its in zip(parts, kept, strict=True):
        load_counts(part, its)
        part._last_lr = rates_of(part, its[RATES], its[BASES])


def rates_of(scheduler: LRScheduler, rates: Sequence[float], bases: Sequence[float]) -> list[float | Tensor]:
    """The saved rates, times what the base rates have been multiplied by since.

    A rank may have fewer groups than the one that spoke for all; then all must have been moved alike.
    """
    own = bases_of(scheduler)
    if own == bases:
        return list(rates)  # to the bit
    factors = [rate / base if base else 1.0 for rate, base in zip(rates, bases, strict=True)]
    if len(factors) != len(own) and max(factors) - min(factors) <= 1e-9 * max(map(abs, factors)):
        factors = factors[:1] * len(own)
    return [base * factor for base, factor in zip(own, by_group(scheduler, factors), strict=True)]


def by_group(scheduler: LRScheduler, values: Sequence[Any]) -> list[Any]:
    """Values of the groups of the checkpoint's optimizer as those of the groups here."""
    wanted = len(groups_of(scheduler))
    if len(values) == wanted:
        return list(values)
    if all(value == values[0] for value in values):
        return [values[0]] * wanted
    raise ValueError(
        f"resume: {type(scheduler).__name__} moved the {len(values)} groups of the checkpoint's optimizer by factors "
        f"of their own, and a rank here has {wanted}; resume under the strategy that wrote it."
    )


def groups_of(scheduler: LRScheduler) -> list[dict[str, Any]]:
    return scheduler.optimizer.param_groups


def parts_of(scheduler: LRScheduler) -> Sequence[LRScheduler]:
    """The schedules that one is made of."""
    return scheduler._schedulers if isinstance(scheduler, SequentialLR | ChainedScheduler) else []


def bases_of(scheduler: LRScheduler) -> list[float]:
    """By group, the rate that a schedule starts from; not every one of torch's keeps it."""
    default = scheduler.optimizer.defaults["lr"]
    kept = scheduler.state_dict().get(BASES)
    return [group.get("initial_lr", default) for group in groups_of(scheduler)] if kept is None else list(kept)


def moves_momenta(scheduler: LRScheduler) -> bool:
    """Whether a schedule moves more than the rate: torch's say so, of others it is not known."""
    moves = scheduler.state_dict().get("cycle_momentum", not is_torchs(scheduler))
    return bool(moves) or any(map(moves_momenta, parts_of(scheduler)))


def is_torchs(scheduler: LRScheduler) -> bool:
    return type(scheduler).__module__ == lr_scheduler.__name__


def is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(map(is_json, value))
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, str) and is_json(item) for key, item in value.items())
    return isinstance(value, int | float | str | bool | type(None))
