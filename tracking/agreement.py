"""Decides whether two runs computed the same thing, to within the rounding that one process commits itself.

Three runs are compared: the *exact* one (one process, float64), the *reference* (one process, in the precision asked
for) and the *candidate* (the strategy, in the same precision). How far the reference lies from the exact run is what
rounding alone does to this very model on these very samples. A strategy sums in another order, so its rounding is
another draw from the same distribution: the candidate may lie MARGIN times as far from the exact run, and no further.

One draw may be small by luck. A candidate that lies just beyond its limit is therefore decided by a few draws more:
exact and reference runs on micro-batches of other sizes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tracking.evidence import Evidence

# Two draws of a tensor's rounding error (an L2 norm over its elements) differ by a small factor; of the faults that
# tests/agreement plants, each goes far beyond it.
MARGIN = 8.0

# Draws that decide a candidate beyond its limit, and how many times beyond it no draw is asked for any more.
MORE_DRAWS = 2
OUT_OF_REACH = 30.0

# Where the reference happens to be exact, a candidate may still round: unit roundoff u of the format in which the
# quantity is held (Higham, Accuracy and Stability of Numerical Algorithms, section 2.1), relative to its size.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

SCALED_WITHIN = 0.01  # of a whole number, a ratio of gradient norms is taken for it
EXACT_WITHIN = 1e-8  # two runs in float64 agree, relative to what is compared

Quantity = Literal["initial weights", "samples", "loss", "gradient norm", "validation loss", "weights"]


class Check(BaseModel):
    """One quantity: where the candidate came closest to its limit, or went furthest beyond it."""

    # A difference may be infinite or no number; JSON knows neither, so they are written as words.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    quantity: Quantity
    count: int  # values compared
    where: str
    difference: float  # from the exact run, at that place
    rounding: float  # the reference's own difference from the exact run, at that place
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit  # False for NaN: what cannot be compared does not agree


class Certificate(BaseModel):
    """The verdict on one candidate, with all that is needed to reproduce it."""

    # A difference may be infinite or no number; JSON knows neither, so they are written as words.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    version: Literal[1] = 1
    verdict: Literal["agrees", "disagrees"]
    strategy: str
    world_size: int
    model: str
    data: str
    precision: str
    steps: int
    checks: list[Check]
    tolerance: str
    conditions: list[str] = Field(default_factory=list)  # under which all of its runs were made, in words
    cause: str = ""  # where they first differ, and the likely kind of fault, in words
    setting: dict[str, Any] = Field(default_factory=dict)  # in which it holds: tracking.certified.setting_of
    subject: str = ""  # what it speaks for: tracking.certified.subject_of
    config_hash: str
    reference_config_hash: str
    environment: dict[str, Any]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2))

    @classmethod
    def read(cls, path: Path) -> Certificate:
        return cls.model_validate(json.loads(path.read_text()))


class Draw(NamedTuple):
    """Two runs of one process on the same samples in the same micro-batches, which differ by rounding alone."""

    exact: Evidence  # in float64
    reference: Evidence  # in the precision asked for


@dataclass(frozen=True)
class Point:
    """One compared value: its name, its sizes of error, and its limit."""

    where: str
    difference: float
    rounding: float
    limit: float

    @property
    def excess(self) -> float:
        """Difference in units of the limit; NaN counts as infinitely far."""
        ratio = self.difference / self.limit if self.limit else float(self.difference > 0) * np.inf
        return float(np.inf if np.isnan(ratio) else ratio)


def worst(quantity: Quantity, points: Iterable[Point]) -> Check:
    """The check of a quantity, decided by its worst point."""
    points = list(points)
    point = max(points, key=lambda point: point.excess)
    return Check(
        quantity=quantity,
        count=len(points),
        where=point.where,
        difference=point.difference,
        rounding=point.rounding,
        limit=point.limit,
    )


def compare_samples(reference: Evidence, candidate: Evidence) -> Check:
    """Every optimizer step must see the same multiset of samples; difference = samples too many or too few."""
    steps = max(len(reference.samples), len(candidate.samples))
    points = []
    for step in range(steps):
        ours, theirs = (side.samples[step] if step < len(side.samples) else [] for side in (candidate, reference))
        points.append(Point(f"step {step}", float(multiset_difference(ours, theirs)), 0.0, 0.0))
    return worst("samples", points)


def multiset_difference(left: Sequence[str], right: Sequence[str]) -> int:
    ours, theirs = Counter(left), Counter(right)
    return ((ours - theirs) + (theirs - ours)).total()


def compare_series(
    quantity: Quantity,
    draws: Sequence[tuple[Sequence[float], Sequence[float]]],
    candidate: Sequence[Sequence[float]],
    u: float,
) -> Check:
    """Compare a scalar per step; `candidate` holds, per step, the value that each rank measured.

    One step's rounding error may be small by luck, so the largest relative error of all steps sets the limit.
    """
    exact, _ = draws[0]
    relative = max(abs(r - e) / abs(e) if e else 0.0 for draw in draws for e, r in zip(*draw, strict=True))
    return worst(
        quantity,
        (
            Point(
                where=f"step {step}, rank {rank}" if len(values) > 1 else f"step {step}",
                difference=abs(value - exact[step]),
                rounding=max(abs(r[step] - e[step]) for e, r in draws),
                limit=MARGIN * max(relative, u) * abs(exact[step]),
            )
            for step, values in enumerate(candidate)
            for rank, value in enumerate(values)
        ),
    )


def compare_first_weights(exact: Evidence, candidate: Evidence, u: float) -> Check:
    """Before the first step all hold the same numbers, rounded once to the format that they are held in."""
    truth = exact.first_weights[0] if exact.first_weights else {}
    seen = {fqn for held in candidate.first_weights for fqn in held}
    points = [Point("no weights", 0.0, 0.0, 0.0)]
    points += [Point(f"{fqn} is not in the reference", np.inf, 0.0, 0.0) for fqn in sorted(seen - truth.keys())]
    for rank, held in enumerate(candidate.first_weights):
        for fqn in sorted(held.keys() & truth.keys()):
            size = float(np.linalg.norm(truth[fqn].astype(np.float64)))
            points.append(Point(f"{fqn}, rank {rank}", distance(held[fqn], truth[fqn]), 0.0, u * size))
    return worst("initial weights", points[1:] or points)


def compare_weights(draws: Sequence[Draw], candidate: Evidence, u: float) -> Check:
    """Compare each parameter, as each rank holds it, by the L2 norm of its difference from the exact one.

    Adam divides by the size of a gradient: where that is next to nothing, rounding makes a step of its own, so a few
    parameters are far off in every draw, and not the same ones. Hence the limit knows what the reference errs by over
    all parameters, too.
    """
    truth = draws[0].exact.weights[0]
    norms = {fqn: float(np.linalg.norm(truth[fqn])) for fqn in truth}
    own = {
        fqn: max(distance(draw.reference.weights[0][fqn], draw.exact.weights[0][fqn]) for draw in draws)
        for fqn in truth
    }
    relative = [own[fqn] / norm for fqn, norm in norms.items() if norm]
    typical = max(u, float(np.sqrt(np.mean(np.square(relative or [0.0])))))  # root mean square
    seen = {fqn for held in candidate.weights for fqn in held}
    points = [Point(f"{fqn} is shown by no rank", np.inf, 0.0, 0.0) for fqn in sorted(truth.keys() - seen)]
    points += [Point(f"{fqn} is not in the reference", np.inf, 0.0, 0.0) for fqn in sorted(seen - truth.keys())]
    for rank, held in enumerate(candidate.weights):
        for fqn in sorted(held.keys() & truth.keys()):
            limit = MARGIN * max(own[fqn], typical * norms[fqn])
            points.append(Point(f"{fqn}, rank {rank}", distance(held[fqn], truth[fqn]), own[fqn], limit))
    return worst("weights", points)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """L2 norm of the difference, taken in float64."""
    return float(np.linalg.norm(left.astype(np.float64) - right.astype(np.float64)))


def compare(draws: Sequence[Draw], candidate: Evidence, *, master: str, parameter: str | None = None) -> list[Check]:
    """All checks of a candidate against the first draw, with what all draws say of rounding.

    `master` is the format of the weights' master copy, in which losses are taken too. `parameter` is that of the
    weights themselves, in which ranks hold them at first, if it is another.
    """
    u = UNIT_ROUNDOFF[master]
    first = draws[0]
    steps = range(min(len(side.losses) for side in (first.exact, first.reference, candidate)))
    checks = [
        compare_first_weights(first.exact, candidate, UNIT_ROUNDOFF[parameter or master]),
        compare_samples(first.reference, candidate),
        compare_series(
            "loss",
            [(draw.exact.losses, draw.reference.losses) for draw in draws],
            [[candidate.losses[step]] for step in steps],
            u,
        ),
        compare_series(
            "gradient norm",
            [(first_of(draw.exact.gradient_norms), first_of(draw.reference.gradient_norms)) for draw in draws],
            candidate.gradient_norms,
            u,
        ),
        compare_weights(draws, candidate, u),
    ]
    if first.exact.val_losses:
        checks.append(compare_validation(draws, candidate, u))
    return checks


def compare_validation(draws: Sequence[Draw], candidate: Evidence, u: float) -> Check:
    """Compare the validation loss, of which each rank has one, behind the last step."""
    if not candidate.val_losses:
        return worst("validation loss", [Point("no rank has one", np.inf, 0.0, 0.0)])
    validated = [(draw.exact.val_losses[:1], draw.reference.val_losses[:1]) for draw in draws]
    return compare_series("validation loss", validated, [candidate.val_losses], u)


def differs_in_validation_alone(checks: Sequence[Check]) -> bool:
    return [check.quantity for check in checks if not check.passed] == ["validation loss"]


def cause_of(
    checks: Sequence[Check], draws: Sequence[Draw], cut: Evidence | None, candidate: Evidence, parts: Mapping[str, int]
) -> str:
    """Where a candidate that disagrees first does so, and the likely kind of fault, in words.

    cut: plain Lightning's run on the candidate's micro-batches, in float64, if that was another. parts: numbers of
    ranks and micro-batches by their names.
    """
    failed = {check.quantity: check for check in checks if not check.passed}
    exact = draws[0].exact
    if check := failed.get("initial weights"):
        return f"First: other initial weights, at {check.where}."
    if check := failed.get("samples"):
        return f"First: other samples, at {check.where}."
    if differs_in_validation_alone(checks):
        return (
            "Only the validation loss differs, on the same weights: what validation_step logs depends on how its "
            "samples are cut (a mean over targets is to be logged with batch_size=<their number>), or on the rank."
        )
    _, where = first_difference(draws, candidate)
    if cut is not None and differs(draws, cut):
        norms = exact.traits.get("batch_norms")
        if norms:
            why = (
                f"statistics of the batch (BatchNorm: {', '.join(norms)}) are those of each micro-batch "
                f"(trainer.sync_batchnorm=true takes them over the micro-batches of all data ranks)"
            )
        else:
            why = (
                "the loss depends on how a batch is cut: it is a mean over something that differs between "
                "micro-batches (return how many as num_targets), or looks at other samples of its batch (contrastive)"
            )
        return f"First at {where}. Plain Lightning on the same micro-batches differs from the whole batch, too: {why}."
    ratio = candidate.gradient_norms[0][0] / exact.gradient_norms[0][0] if exact.gradient_norms[0][0] else np.nan
    for name, number in parts.items():
        for factor, said in ((number, "multiplied"), (1 / number, "divided")):
            if number > 1 and abs(ratio / factor - 1) < SCALED_WITHIN:
                return f"First at {where}. The gradient is {said} by {number}, the number of {name}."
    return f"First at {where}; the gradient's norm is {ratio:.4g} of plain Lightning's in the first step."


def first_difference(draws: Sequence[Draw], candidate: Evidence) -> tuple[int, str]:
    """The first step, and the quantity, that is further off than the reference in any step could explain."""
    exact, reference = draws[0]
    for step, loss in enumerate(candidate.losses):
        pairs = {
            "loss": ([loss], exact.losses, reference.losses),
            "gradient norm": (candidate.gradient_norms[step], *map(first_of_all, draws[0])),
        }
        for name, (values, truth, own) in pairs.items():
            rounding = max(abs(r - e) / abs(e) if e else 0.0 for e, r in zip(truth, own, strict=True))
            limit = MARGIN * max(rounding, UNIT_ROUNDOFF["float32"]) * abs(truth[step])
            for rank, value in enumerate(values):
                if not abs(value - truth[step]) <= limit:
                    return step, f"the {name} of step {step}" + (f", rank {rank}" if len(values) > 1 else "")
    return len(candidate.losses) - 1, "the weights, behind the last step"


def first_of_all(evidence: Evidence) -> list[float]:
    return first_of(evidence.gradient_norms)


def differs(draws: Sequence[Draw], other: Evidence) -> bool:
    """Whether another run of float64 is further off than any rounding."""
    series = zip(draws[0].exact.losses, other.losses, strict=False)
    norms = zip(first_of_all(draws[0].exact), first_of_all(other), strict=False)
    return any(not abs(a - b) <= EXACT_WITHIN * abs(a) for a, b in (*series, *norms))


def first_of(by_rank: Sequence[Sequence[float]]) -> list[float]:
    return [values[0] for values in by_rank]


def another_draw_matters(checks: Sequence[Check]) -> bool:
    """Whether a candidate is beyond a limit, and not so far beyond that no draw of rounding would explain it."""
    failed = [check for check in checks if not check.passed]
    return bool(failed) and all(check.difference <= OUT_OF_REACH * check.limit for check in failed)


def other_micro_batches(global_batch_size: int, micro_batch_size: int) -> list[int]:
    """Micro-batch sizes for further draws: the next smaller ones, which need no more memory; 2 where there is none."""
    sizes = [size for size in range(micro_batch_size - 1, 0, -1) if global_batch_size % size == 0]
    if not sizes and global_batch_size % 2 == 0:
        sizes = [2]
    return sizes[:MORE_DRAWS]


def tolerance_text(master: str) -> str:
    return (
        f"A difference from the exact run (one process, float64) is allowed up to {MARGIN:g} times the reference's own "
        f"(one process, same precision), or {MARGIN:g} times {master}'s unit roundoff ({UNIT_ROUNDOFF[master]:.2g}) "
        f"relative to the value, whichever is more. Scalars take the reference's largest relative difference over all "
        f"steps; weights are compared parameter by parameter in L2 norm, where the reference's own difference counts "
        f"as at least its root mean square over all parameters, relative to their size. A candidate just beyond a "
        f"limit is decided by up to {MORE_DRAWS} more pairs of runs of one process, on other micro-batches: the "
        f"largest difference of all pairs counts. Samples must be the same, step by step."
    )
