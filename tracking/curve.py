"""Losses of runs by optimizer step, tokens and time, and how far they lie from the reference's."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from tracking.sources import Run


class _Losses(BaseModel):
    # JSON has no NaN: a diverged loss is written as the string "NaN".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Validations(_Losses):
    """Validation losses by optimizer step; `seconds` is the training time until then."""

    steps: list[int]
    tokens: list[int | None]
    seconds: list[float | None]
    loss: list[float]


class Curve(_Losses):
    """Losses by optimizer step; `seconds` adds up step times as they were logged, validation and saving left out."""

    steps: list[int]
    tokens: list[int | None]
    seconds: list[float | None]
    train_loss: list[float]
    difference: list[float | None]  # from the reference at the same step
    deviation: list[float | None]  # of train_loss over repeats
    validations: Validations


def curve_of(run: Run) -> Curve:
    rows = [row for row in run.history if "train/loss" in row]
    steps = [int(row["step"]) for row in rows]
    record = run.record
    per_step = None if record is None else record.batch.global_ * record.batch.tokens_per_sample
    # Rows of the warm-up have no time of their own.
    usual_ms = None if record is None else record.results.step_ms_p50
    seconds: list[float | None] = []
    total: float | None = 0.0
    for before, row in zip([0, *steps], rows, strict=False):
        step_ms = row.get("perf/step_ms", usual_ms)
        total = None if total is None or step_ms is None else total + (row["step"] - before) * step_ms / 1000
        seconds.append(total)
    return Curve(
        steps=steps,
        tokens=[None if per_step is None else step * per_step for step in steps],
        seconds=seconds,
        train_loss=[row["train/loss"] for row in rows],
        difference=[None] * len(rows),
        deviation=[None] * len(rows),
        validations=_validations(run, per_step, steps, seconds),
    )


def _validations(run: Run, per_step: int | None, steps: Sequence[int], seconds: Sequence[float | None]) -> Validations:
    rows = [row for row in run.history if "val/loss" in row]
    places = [int(row["step"]) for row in rows]
    return Validations(
        steps=places,
        tokens=[None if per_step is None else step * per_step for step in places],
        seconds=[_seconds_at(step, steps, seconds) for step in places],
        loss=[row["val/loss"] for row in rows],
    )


def _seconds_at(step: int, steps: Sequence[int], seconds: Sequence[float | None]) -> float | None:
    """Training time until a step, in proportion between those that have been logged."""
    before, spent = 0, 0.0
    for logged, second in zip(steps, seconds, strict=True):
        if second is None:
            return None
        if step <= logged:
            return spent + (second - spent) * (step - before) / (logged - before)
        before, spent = logged, second
    return None


def against(curve: Curve, reference: Curve | None) -> Curve:
    theirs = {} if reference is None else dict(zip(reference.steps, reference.train_loss, strict=True))
    difference = [
        loss - theirs[step] if step in theirs else None
        for step, loss in zip(curve.steps, curve.train_loss, strict=True)
    ]
    return curve.model_copy(update={"difference": difference})


def reached_by_all(curves: Iterable[Curve]) -> float | None:
    lowest = [min(loss for loss in curve.train_loss if math.isfinite(loss)) for curve in curves if _finite(curve)]
    return max(lowest, default=None)


def _finite(curve: Curve) -> bool:
    return any(math.isfinite(loss) for loss in curve.train_loss)


def time_to(curve: Curve, target: float | None) -> float | None:
    if target is None:
        return None
    reached = (second for second, loss in zip(curve.seconds, curve.train_loss, strict=True) if loss <= target)
    return next(reached, None)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Means over the repeats, at the steps that all of them have."""
    if len(curves) == 1:
        return curves[0]
    steps = [step for step in curves[0].steps if all(step in curve.steps for curve in curves[1:])]

    def at(values: Callable[[Curve], Sequence[float | None]], step: int) -> list[float]:
        found = (values(curve)[curve.steps.index(step)] for curve in curves)
        return [value for value in found if value is not None]

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if len(values) == len(curves) else None

    losses = [at(lambda curve: curve.train_loss, step) for step in steps]
    return Curve(
        steps=steps,
        tokens=[curves[0].tokens[curves[0].steps.index(step)] for step in steps],
        seconds=[mean(at(lambda curve: curve.seconds, step)) for step in steps],
        train_loss=[statistics.fmean(values) for values in losses],
        difference=[mean(at(lambda curve: curve.difference, step)) for step in steps],
        deviation=[statistics.stdev(values) if all(map(math.isfinite, values)) else None for values in losses],
        validations=_mean_validations([curve.validations for curve in curves]),
    )


def _mean_validations(repeats: Sequence[Validations]) -> Validations:
    first = repeats[0]
    losses = [dict(zip(one.steps, one.loss, strict=True)) for one in repeats]
    shared = [place for place, step in enumerate(first.steps) if all(step in those for those in losses)]
    return Validations(
        steps=[first.steps[place] for place in shared],
        tokens=[first.tokens[place] for place in shared],
        seconds=[first.seconds[place] for place in shared],
        loss=[statistics.fmean(those[first.steps[place]] for those in losses) for place in shared],
    )
