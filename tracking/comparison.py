"""Runs laid side by side as figures: what each reached and cost, and what it was against the reference."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from tracking.certified import Verdict, verdict_on
from tracking.comparability import Difference, Doubt, config_differences, doubts
from tracking.curve import Curve, Losses, differences, losses_of, mean_curve, reached_by_all, time_to
from tracking.gantt import Bar, last_step
from tracking.labels import groups_of, labels_of, members_of, seed_of
from tracking.record import Collective, Memory, RunRecord
from tracking.redact import redact
from tracking.refuted import is_refuted
from tracking.shown import shown_ranks
from tracking.sources import Run

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "buffers", "activations", "other")


class _Figures(BaseModel):
    # JSON has no NaN: a diverged loss is written as the string "NaN".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Spread(_Figures):
    """Mean over repeats, and their sample standard deviation; None where there is nothing to take it of."""

    mean: float
    deviation: float | None
    count: int


class Traffic(_Figures):
    """One kind of collective on one axis: bytes and seconds of an optimizer step, mean over the ranks."""

    collective: str
    axis: str
    calls: float
    payload: float
    seconds: float | None


# "refuted" is of a run whose certificate says that it agrees, and whose losses say that it does not.
ShownVerdict = Literal["agrees", "disagrees", "refuted"]


class RunFigures(_Figures):
    """One run; None is what was not measured."""

    label: str
    name: str
    folder: str | None
    strategy: str | None
    seed: int | None
    state: str
    error: str | None
    ranks: int | None
    mesh: str | None
    steps: int | None
    train_loss: float | None
    val_loss: float | None
    loss_difference: float | None  # largest from the reference, of the steps that both logged
    loss_difference_step: int | None
    compared_steps: int  # that both logged
    loss_digits: int | None  # to which its losses are the reference's, at the step where fewest are
    diverged: bool  # a loss is no number
    tokens_per_s: float | None
    tokens_per_s_deviation: float | None  # over its logged rows
    tokens_per_s_per_device: float | None
    speed_up: float | None
    efficiency: float | None
    mfu: float | None
    step_ms_p50: float | None
    step_ms_p95: float | None
    peak_gib: float | None  # of the rank that held most
    shown_ranks: list[int]  # those that memory, waiting and the Gantt chart are told of
    peak_gib_by_rank: list[float]
    memory: list[Memory]
    memory_limit: int | None
    memory_source: str | None
    traffic: list[Traffic]
    sent_bytes: float | None
    wait_share: float | None
    wait_share_by_rank: list[float]
    idle_share: float | None
    wall_s: float | None
    startup_s: float | None
    seconds_to_target: float | None
    verdict: ShownVerdict | None
    curve: Curve
    gantt: list[Bar]
    gantt_step: int | None
    missing: list[str]


class Series(_Figures):
    """Runs that differ by seed alone: one line, one bar."""

    label: str
    runs: list[int]  # places in Comparison.runs
    ranks: int | None
    spreads: dict[str, Spread]  # by the name of the figure
    curve: Curve
    on_front: bool  # no other needs both less time and less memory


class Comparison(_Figures):
    """All that the table, the page and the pictures show."""

    reference: str | None
    target_loss: float | None
    runs: list[RunFigures]
    series: list[Series]
    doubts: list[Doubt]
    differences: list[Difference]


# Points of a curve that are drawn. All runs' curves share the last, so that a page of hundreds of runs still opens.
FEWEST_POINTS, MOST_POINTS, POINTS_IN_ALL = 50, 1000, 40_000

FLOAT64_DIGITS = 17

LOSSES = ("train_loss", "val_loss")

SPREADS = (
    "tokens_per_s",
    "tokens_per_s_per_device",
    "speed_up",
    "efficiency",
    "mfu",
    "step_ms_p50",
    "peak_gib",
    "train_loss",
    "val_loss",
    "seconds_to_target",
)


def compare_runs(
    runs: Sequence[Run], *, target_loss: float | None = None, certificates: Sequence[Verdict] = ()
) -> Comparison:
    """`target_loss` is the training loss that times are taken to; by default the lowest that every run reached.

    `certificates` speak for the runs that they fit, as do those that lie in the runs' own folders.
    """
    certificates = [*(run.verdict for run in runs if run.verdict is not None), *certificates]
    groups = groups_of(runs)
    labels = labels_of(runs, groups)
    reference = _reference(runs, groups)
    losses = [losses_of(run) for run in runs]
    # A run that broke off early would set a target that says nothing of the others.
    complete = [own for own, run in zip(losses, runs, strict=True) if run.record is not None]
    target = target_loss if target_loss is not None else reached_by_all(complete)
    most = max(FEWEST_POINTS, min(MOST_POINTS, POINTS_IN_ALL // max(len(runs), 1)))
    figures: list[RunFigures] = []
    series = []
    for group, label in zip(groups, labels, strict=True):
        apart = []
        places = range(len(figures), len(figures) + len(group))
        for index, named in zip(group, members_of(label, [runs[index] for index in group]), strict=True):
            partner = _partner(runs, index, reference)
            other = None if partner is None else (runs[partner], losses[partner])
            apart.append(differences(losses[index], None if other is None else other[1]))
            curve = mean_curve([losses[index]], apart[-1:], most=most)
            found = _losses(losses[index], apart[-1], target)
            figures.append(_figures(runs[index], named, curve, found, other and other[0], certificates))
        curve = mean_curve([losses[index] for index in group], apart, most=most)
        series.append(_series(label, list(places), figures, curve))
    return Comparison(
        reference=None if reference is None else labels[groups.index(reference)],
        target_loss=target,
        runs=figures,
        series=_with_front(series),
        doubts=[*doubts(runs, labels, groups), *uncertified(figures), *refuted(figures)],
        differences=config_differences(runs, labels, groups),
    )


def best_run(runs: Sequence[RunFigures], figure: str) -> int | None:
    """Which run's figure is the best; None where none has it."""
    values = {
        place: value
        for place, run in enumerate(runs)
        if (value := getattr(run, figure)) is not None and math.isfinite(value)
    }
    choose = max if figure in MORE_IS_BETTER else min
    return choose(values, key=values.__getitem__, default=None)


MORE_IS_BETTER = ("tokens_per_s", "tokens_per_s_per_device", "speed_up", "efficiency", "mfu")


def differ(left: Spread, right: Spread) -> bool:
    """Whether two means lie further apart than their spreads reach; without any spread, every difference counts."""
    return abs(left.mean - right.mean) > (left.deviation or 0.0) + (right.deviation or 0.0)


def _reference(runs: Sequence[Run], groups: Sequence[list[int]]) -> list[int] | None:
    """The group of `single`, else the first that has a record."""
    complete = [group for group in groups if runs[group[0]].record is not None]
    single = [group for group in complete if runs[group[0]].strategy == "single"]
    return next(iter(single or complete), None)


def _partner(runs: Sequence[Run], index: int, reference: list[int] | None) -> int | None:
    """The reference's run of the same seed, else its first."""
    if reference is None:
        return None
    same = [other for other in reference if seed_of(runs[other]) == seed_of(runs[index])]
    return next(iter(same or reference))


def _figures(
    run: Run,
    label: str,
    curve: Curve,
    losses: dict[str, Any],
    reference: Run | None,
    certificates: Sequence[Verdict],
) -> RunFigures:
    speeds = run.history["perf/tokens_per_s"].values if "perf/tokens_per_s" in run.history else []
    shown = _shown(run)
    bars = last_step(run.trace, shown)
    values: dict[str, Any] = dict.fromkeys(RunFigures.model_fields)
    values |= {"memory": [], "traffic": [], "peak_gib_by_rank": [], "wait_share_by_rank": []}
    if run.record is not None:
        values |= _measured(run.record, None if reference is None else reference.record, shown)
    traced = [] if run.record is None else run.record.results.traced_steps
    return RunFigures.model_validate(
        values
        | losses
        | {
            "label": label,
            "name": run.name,
            "folder": None if run.folder is None else run.folder.name,
            "strategy": run.strategy,
            "state": run.state,
            "error": run.error and str(redact(run.error)),  # a page is shared, and goes to W&B
            "tokens_per_s_deviation": float(np.std(speeds, ddof=1)) if len(speeds) > 1 else None,
            "verdict": _shown_verdict(run, certificates, losses, reference),
            "curve": curve,
            "shown_ranks": shown,
            "gantt": bars,
            "gantt_step": traced[-1] if traced and bars else None,
            "missing": _missing(run),
        }
    )


def _losses(losses: Losses, apart: Sequence[float | None], target: float | None) -> dict[str, Any]:
    """Figures of all losses that were logged, more than are drawn."""
    train = losses.train
    known = [(abs(d), s) for d, s in zip(apart, train.steps, strict=True) if d is not None and math.isfinite(d)]
    largest = max(known, default=(None, None), key=lambda pair: pair[0])
    return {
        "loss_difference": largest[0],
        "loss_difference_step": largest[1],
        "compared_steps": len(known),
        "loss_digits": _digits(train.values, apart),
        "diverged": not all(map(math.isfinite, train.values)),
        "seconds_to_target": time_to(losses, target),
    }


def _digits(losses: Sequence[float], apart: Sequence[float | None]) -> int | None:
    """Digits to which the losses are the reference's; None where that has none at the same steps."""
    shares = [
        abs(difference) / abs(loss - difference)
        for difference, loss in zip(apart, losses, strict=True)
        if difference is not None and math.isfinite(difference) and loss != difference
    ]
    if not shares:
        return None
    largest = max(shares)
    return FLOAT64_DIGITS if largest == 0 else max(0, math.floor(-math.log10(largest)))


def _shown(run: Run) -> list[int]:
    if run.record is None:
        return shown_ranks(1 + max((event.rank for event in run.trace), default=-1))
    return shown_ranks(run.record.world_size, run.record.results.wait_share, run.record.results.peak_gib)


def _of_ranks(values: Sequence[Any], ranks: Sequence[int]) -> list[Any]:
    return [values[rank] for rank in ranks if rank < len(values)]


def _measured(record: RunRecord, reference: RunRecord | None, shown: Sequence[int]) -> dict[str, Any]:
    results, ranks = record.results, record.world_size
    traffic = _mean_traffic(results.traffic)
    speed_up = efficiency = None
    if reference is not None and results.tokens_per_s and reference.results.tokens_per_s:
        speed_up = results.tokens_per_s / reference.results.tokens_per_s
        efficiency = speed_up * reference.world_size / ranks
    mesh = record.mesh
    return {
        "seed": record.seed,
        "ranks": ranks,
        "mesh": f"{mesh.pipe} x {mesh.data} x {mesh.tensor}",
        "steps": results.steps,
        "train_loss": results.train_loss,
        "val_loss": results.val_loss,
        "tokens_per_s": results.tokens_per_s,
        "tokens_per_s_per_device": results.tokens_per_s and results.tokens_per_s / ranks,
        "speed_up": speed_up,
        "efficiency": efficiency,
        "mfu": results.mfu,
        "step_ms_p50": results.step_ms_p50,
        "step_ms_p95": results.step_ms_p95,
        "peak_gib": max(results.peak_gib, default=None),
        "peak_gib_by_rank": _of_ranks(results.peak_gib, shown),
        "memory": _of_ranks(results.memory, shown),
        "memory_limit": results.memory_limit,
        "memory_source": results.memory_source,
        "traffic": traffic,
        "sent_bytes": sum(part.payload for part in traffic) if results.traffic else None,
        "wait_share": statistics.fmean(results.wait_share) if results.wait_share else None,
        "wait_share_by_rank": _of_ranks(results.wait_share, shown),
        "idle_share": statistics.fmean(results.idle_share) if results.idle_share else None,
        "wall_s": results.wall_s,
        "startup_s": results.startup_s,
    }


def _mean_traffic(by_rank: Sequence[Sequence[Collective]]) -> list[Traffic]:
    """Most bytes first."""
    kinds: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for rank in by_rank:
        for part in rank:
            kinds[part.collective, part.axis].append(part)
    found = [
        Traffic(
            collective=collective,
            axis=axis,
            calls=sum(part.calls for part in parts) / len(by_rank),
            payload=sum(part.payload for part in parts) / len(by_rank),
            seconds=_total(parts, len(by_rank)),
        )
        for (collective, axis), parts in kinds.items()
    ]
    return sorted(found, key=lambda part: -part.payload)


def _total(parts: Sequence[Collective], ranks: int) -> float | None:
    times = [part.seconds for part in parts if part.seconds is not None]
    return sum(times) / ranks if len(times) == len(parts) else None


def _shown_verdict(
    run: Run, certificates: Sequence[Verdict], losses: dict[str, Any], reference: Run | None
) -> ShownVerdict | None:
    verdict = verdict_of(run, certificates)
    if verdict != "agrees" or run.record is None or reference is None:
        return verdict
    theirs = losses_of(reference).train.values
    return "refuted" if is_refuted(losses, run.record, reference.record, theirs) else verdict


def verdict_of(run: Run, certificates: Sequence[Verdict]) -> Literal["agrees", "disagrees"] | None:
    """That of the run's own certificate, else of one that speaks for it."""
    if run.verdict is not None:
        return run.verdict.verdict
    return None if run.record is None else verdict_on(run.record, certificates)


def uncertified(runs: Sequence[RunFigures]) -> list[Doubt]:
    """A warning of the strategies that nothing has been proved of; `single` is what others are certified against."""
    lacking = [run for run in runs if run.verdict is None and run.ranks is not None and run.strategy != "single"]
    if not lacking:
        return []
    strategies = ",".join(dict.fromkeys(str(run.strategy) for run in lacking))
    labels = ", ".join(run.label for run in lacking)
    text = (
        f"no certificate for {labels}: whether it is what one process computes is not proved yet; "
        f"python scripts/verify.py -m strategy={strategies}, with these runs' other choices, tells."
    )
    return [Doubt(fact="certificate", text=text)]


def refuted(runs: Sequence[RunFigures]) -> list[Doubt]:
    """A warning of each run that is not what its certificate says."""
    return [
        Doubt(
            fact="certificate",
            text=(
                f"{run.label} has a certificate, but its losses are not those of the same training in the reference: "
                f"{_apart(run)}, beyond rounding; it is not called certified. Dropout and other noise part runs whose "
                f"micro-batches differ; else look for what the certificate's few steps did not show."
            ),
        )
        for run in runs
        if run.verdict == "refuted"
    ]


def _apart(run: RunFigures) -> str:
    if run.diverged:
        return "some are no numbers"
    return f"they differ by {run.loss_difference:.1e} at step {run.loss_difference_step}"


def _missing(run: Run) -> list[str]:
    """What a reader would look for and not find, and why."""
    lacks = [str(redact(note)) for note in run.notes]
    if run.record is None:
        return [*lacks, "no record: the run did not complete"]
    results = run.record.results
    checks: list[tuple[Any, str]] = [
        (run.history, "no metrics.csv: losses by step"),
        (results.tokens_per_s, "too few steps behind the warm-up: times"),
        (results.memory, "memory by category"),
        (results.traffic, "traffic"),
        (run.trace, "no trace.json: what a step's time goes to"),
    ]
    return lacks + [text for value, text in checks if not value]


def _series(label: str, places: list[int], figures: Sequence[RunFigures], curve: Curve) -> Series:
    members = [figures[place] for place in places]
    spreads = {name: spread for name in SPREADS if (spread := _spread(members, name)) is not None}
    return Series(
        label=label,
        runs=places,
        ranks=members[0].ranks,
        spreads=spreads,
        curve=curve,
        on_front=False,
    )


def _spread(members: Sequence[RunFigures], figure: str) -> Spread | None:
    values = [value for run in members if (value := getattr(run, figure)) is not None and math.isfinite(value)]
    if not values or (figure == "seconds_to_target" and len(values) < len(members)):
        return None
    # What runs of one seed reach is the same again, and says nothing of chance.
    by_seed = {run.seed: value for run in members if (value := getattr(run, figure)) is not None}
    draws = list(by_seed.values()) if figure in LOSSES else values
    deviation = statistics.stdev(draws) if len(draws) > 1 and all(map(math.isfinite, draws)) else None
    if deviation is None and figure == "tokens_per_s":
        deviation = members[0].tokens_per_s_deviation
    return Spread(mean=statistics.fmean(values), deviation=deviation, count=len(values))


def _with_front(series: Sequence[Series]) -> list[Series]:
    """Marks the Pareto front of time to the target loss against peak memory of a device."""
    points = {
        place: (one.spreads["seconds_to_target"].mean, one.spreads["peak_gib"].mean)
        for place, one in enumerate(series)
        if {"seconds_to_target", "peak_gib"} <= one.spreads.keys()
    }
    front = {
        place
        for place, (time, memory) in points.items()
        if not any(t <= time and m <= memory and (t, m) != (time, memory) for t, m in points.values())
    }
    return [one.model_copy(update={"on_front": place in front}) for place, one in enumerate(series)]
