"""Where in a step two runs part: the first module whose value, or gradient, is another, and on which rank.

Imports no torch, as all that compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, isfinite
from typing import Any, NamedTuple

from tracking.evidence import Evidence

WEIGHED_ALIKE_WITHIN = 0.02  # of losses: rounding in 16 bits is less, and a fault more

Digest = Sequence[float]  # number of elements, norm, projections


class Key(NamedTuple):
    """Of a digest: the micro-batch in its step, the module, value or gradient, and which of the module's calls."""

    micro_batch: int
    fqn: str
    kind: str
    call: int


@dataclass(frozen=True)
class Parting:
    """Judges digests of a candidate by those of one process, in float64 and as asked for."""

    margin: float
    unit_roundoff: float

    def is_other(self, exact: Digest, reference: Digest, candidate: Digest) -> bool:
        """Whether the candidate is further off than rounding explains; False where it has but a part."""
        if candidate[0] != exact[0]:
            return False
        own = off(reference, exact)
        size = max(abs(exact[1]), abs(reference[1]))
        return not off(candidate, exact) <= self.margin * max(own, self.unit_roundoff * size)


def off(one: Digest, other: Digest) -> float:
    differences = [abs(a - b) for a, b in zip(one[1:], other[1:], strict=True)]
    return max(differences) if all(map(isfinite, differences)) else inf


def first_parting(exact: Evidence, reference: Evidence, candidate: Evidence, step: int, judge: Parting) -> str:
    """In words, for runs whose modules were written down in this step on micro-batches of one size."""
    truth, own = exact.modules[0], reference.modules[0]
    for rank, held in enumerate(candidate.modules):
        for fqn in differing(truth, own, held, "before", judge):
            past = f"the update of step {step - 1} has made" if step else "the run starts with"
            return f"Before step {step} parameter {fqn} is another on rank {rank}: {past} it so."
    true_calls, own_calls = calls_of(truth, truth), calls_of(own, truth)
    raw = [calls_of(held, truth) for held in candidate.modules]
    weights = [weights_of(calls, true_calls) for calls in raw]
    ranks = [scaled(calls, of_rank) for calls, of_rank in zip(raw, weights, strict=True)]
    for kind, said in (("value", "gives"), ("gradient", "gets back as its output's gradient")):
        for key, call in true_calls.items():
            if key.kind != kind or key not in own_calls:
                continue
            for rank, calls in enumerate(ranks):
                if key in calls and judge.is_other(call, own_calls[key], calls[key]):
                    return (
                        f"In step {step} what {key.fqn} {said} is the first to be another, in micro-batch "
                        f"{key.micro_batch}, on rank {rank}."
                    )
    told = [(weight, place) for of_rank in weights for place, weight in of_rank.items()]
    least, most = min(told, default=(1.0, 0)), max(told, default=(1.0, 0))
    if most[0] > least[0] * (1 + WEIGHED_ALIKE_WITHIN):
        return (
            f"In step {step} all that modules give and get back is right, but the gradient at the loss of micro-batch "
            f"{least[1]} is {least[0] / most[0]:.4g} times that of micro-batch {most[1]}."
        )
    for rank, held in enumerate(candidate.modules):
        if others := list(differing(truth, own, held, "behind", judge)):
            return (
                f"In step {step} all that modules give and get back is right; behind it {len(others)} of "
                f"{len(held['weights']['behind'])} parameters of rank {rank} are others, {others[0]} first: look at "
                f"how their gradients are reduced, clipped and stepped."
            )
    return f"Step {step}, run again, shows no module and no parameter that is another."


def weights_of(calls: Mapping[Key, Digest], true_calls: Mapping[Key, Digest]) -> dict[int, float]:
    """By micro-batch: how many times the reference's its first gradient is, the one nearest to its loss."""
    weights: dict[int, float] = {}
    for key, digest in calls.items():
        if key.kind == "gradient" and key in true_calls and true_calls[key][1]:
            weights.setdefault(key.micro_batch, digest[1] / true_calls[key][1])
    return weights


def scaled(calls: Mapping[Key, Digest], weights: Mapping[int, float]) -> dict[Key, Digest]:
    """The same, with gradients divided by their micro-batch's weight.

    What a loss is divided by, such as the number of micro-batches of a rank, is no module's doing.
    """
    found: dict[Key, Digest] = {}
    for key, digest in calls.items():
        weight = weights.get(key.micro_batch, 1.0) if key.kind == "gradient" else 1.0
        if weight:  # of a loss that counts nothing there is no gradient to compare
            found[key] = [digest[0], *(part / weight for part in digest[1:])]
    return found


def differing(
    truth: Mapping[str, Any], own: Mapping[str, Any], held: Mapping[str, Any], when: str, judge: Parting
) -> Iterator[str]:
    """FQNs of parameters that a rank holds otherwise before, or behind, the step."""
    for fqn, weight in held["weights"][when].items():
        exact = truth["weights"][when].get(fqn)
        if exact is not None and judge.is_other(exact, own["weights"][when][fqn], weight):
            yield fqn


def calls_of(held: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[Key, Digest]:
    """Digests of a rank by the micro-batch of the step, in the order in which they came.

    A pipeline cuts a rank's micro-batch further: its modules are called as many times as often as the reference's.
    """
    replicas, rank = held["slicing"]["num_replicas"], held["slicing"]["rank"]
    own_counts, true_counts = counts(held), counts(truth)
    seen: dict[tuple[int, str, str], int] = {}
    found: dict[Key, Digest] = {}
    for call in held["calls"]:
        fqn, kind, number = call["fqn"], call["kind"], call["number"]
        if (fqn, kind) not in true_counts:
            continue
        calls = true_counts[fqn, kind]
        nth = seen.get((number, fqn, kind), 0)
        seen[number, fqn, kind] = nth + 1
        parts = max(1, own_counts[fqn, kind] // calls)
        micro_batch = (number * replicas + rank) * parts + nth // calls
        found[Key(micro_batch, fqn, kind, nth % calls)] = call["digest"]
    return found


def counts(held: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """How often a module gives a value, or gets a gradient, in the first micro-batch."""
    keys = sorted((call["fqn"], call["kind"]) for call in held["calls"] if call["number"] == 0)
    return {key: len(list(same)) for key, same in groupby(keys)}
