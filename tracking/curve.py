"""Losses of runs by optimizer step, tokens and time, and how far they lie from the reference's."""

from __future__ import annotations

import math
import statistics
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tracking.comparability import beginning
from tracking.history import Column
from tracking.sources import Run

NOTHING = Column(array("q"), array("d"))


@dataclass(frozen=True)
class Losses:
    """All losses that a run logged; `seconds` is the training time until each step, None where steps have no time."""

    train: Column
    validation: Column
    seconds: array[float] | None
    tokens_per_step: int | None


class _Drawn(BaseModel):
    # JSON has no NaN: a diverged loss is written as the string "NaN".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Validations(_Drawn):
    """Validation losses by optimizer step; `seconds` is the training time until then."""

    steps: list[int]
    tokens: list[int | None]
    seconds: list[float | None]
    loss: list[float]


class Curve(_Drawn):
    """Losses by optimizer step, as many as are drawn; `seconds` is training time, validation and saving left out."""

    steps: list[int]
    tokens: list[int | None]
    seconds: list[float | None]
    train_loss: list[float]
    difference: list[float | None]  # from the reference at the same step
    deviation: list[float | None]  # of train_loss over repeats
    validations: Validations
    logged: int  # training losses that there are


def losses_of(run: Run) -> Losses:
    """The run's losses; `seconds` adds up step times as they were logged."""
    train = run.history.get("train/loss", NOTHING)
    record = run.record
    return Losses(
        train=train,
        validation=run.history.get("val/loss", NOTHING),
        seconds=_seconds(run, train.steps),
        tokens_per_step=None if record is None else record.batch.global_ * record.batch.tokens_per_sample,
    )


def _seconds(run: Run, steps: Sequence[int]) -> array[float] | None:
    # Rows of the warm-up have no time of their own.
    usual_ms = None if run.record is None else run.record.results.step_ms_p50
    timed = run.history.get("perf/step_ms", NOTHING)
    step_ms = dict(zip(timed.steps, timed.values, strict=True))
    seconds = array("d")
    total, before = 0.0, _first_step(run, steps)
    for step in steps:
        own = step_ms.get(step, usual_ms)
        if own is None:
            return None
        total, before = total + (step - before) * own / 1000, step
        seconds.append(total)
    return seconds


def _first_step(run: Run, steps: Sequence[int]) -> int:
    """The optimizer step before the run's first own one."""
    began = 0 if run.record is None else beginning(run.record)
    return began if isinstance(began, int) and steps and began < steps[0] else 0


def differences(own: Losses, reference: Losses | None) -> list[float | None]:
    """How far each training loss lies from the reference's at the same step; None where that logged none."""
    theirs = {} if reference is None else dict(zip(reference.train.steps, reference.train.values, strict=True))
    return [
        loss - theirs[step] if step in theirs else None
        for step, loss in zip(own.train.steps, own.train.values, strict=True)
    ]


def reached_by_all(runs: Iterable[Losses]) -> float | None:
    """The lowest training loss that every run reached, of those that logged any."""
    lowest = [min(filter(math.isfinite, losses.train.values), default=None) for losses in runs]
    return max((loss for loss in lowest if loss is not None), default=None)


def time_to(losses: Losses, target: float | None) -> float | None:
    """Training time until the loss is `target` or less."""
    if target is None or losses.seconds is None:
        return None
    reached = (second for second, loss in zip(losses.seconds, losses.train.values, strict=True) if loss <= target)
    return next(reached, None)


def mean_curve(repeats: Sequence[Losses], apart: Sequence[Sequence[float | None]], *, most: int) -> Curve:
    """Means over the repeats, at the steps that all of them have; of these, `most` that are evenly spread.

    `apart` are the repeats' `differences`.
    """
    first = repeats[0]
    steps = _spread(_shared([losses.train.steps for losses in repeats]), most)
    places = [[bisect_left(losses.train.steps, step) for step in steps] for losses in repeats]
    trained = [[losses.train.values[place] for place in own] for losses, own in zip(repeats, places, strict=True)]
    seconds = [
        [None if losses.seconds is None else losses.seconds[place] for place in own]
        for losses, own in zip(repeats, places, strict=True)
    ]
    from_reference = [[found[place] for place in own] for found, own in zip(apart, places, strict=True)]
    return Curve(
        steps=steps,
        tokens=_tokens(first, steps),
        seconds=_means(seconds),
        train_loss=[statistics.fmean(values) for values in zip(*trained, strict=True)],
        difference=_means(from_reference),
        deviation=[_deviation(values) for values in zip(*trained, strict=True)],
        validations=_mean_validations(repeats, most),
        logged=len(first.train.steps),
    )


def _mean_validations(repeats: Sequence[Losses], most: int) -> Validations:
    steps = _spread(_shared([losses.validation.steps for losses in repeats]), most)
    values = [
        [losses.validation.values[bisect_left(losses.validation.steps, step)] for step in steps] for losses in repeats
    ]
    return Validations(
        steps=steps,
        tokens=_tokens(repeats[0], steps),
        seconds=[_seconds_at(repeats[0], step) for step in steps],
        loss=[statistics.fmean(own) for own in zip(*values, strict=True)],
    )


def _seconds_at(losses: Losses, step: int) -> float | None:
    """Training time until a step, in proportion between those that have been logged."""
    steps, seconds = losses.train.steps, losses.seconds
    place = bisect_left(steps, step)
    if seconds is None or place == len(steps):
        return None
    before, spent = (steps[place - 1], seconds[place - 1]) if place else (0, 0.0)
    return spent + (seconds[place] - spent) * (step - before) / (steps[place] - before)


def _shared(by_repeat: Sequence[Sequence[int]]) -> list[int]:
    return sorted(set(by_repeat[0]).intersection(*by_repeat[1:]))


def _spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def _tokens(losses: Losses, steps: Sequence[int]) -> list[int | None]:
    each = losses.tokens_per_step
    return [None if each is None else step * each for step in steps]


def _means(by_repeat: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Means over the repeats, None where one has no value."""
    found: list[float | None] = []
    for values in zip(*by_repeat, strict=True):
        known = [value for value in values if value is not None]
        found.append(statistics.fmean(known) if len(known) == len(values) else None)
    return found


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
