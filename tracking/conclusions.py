"""What a comparison's figures say, in plain sentences."""

from collections.abc import Sequence

from tracking.comparison import Comparison, RunFigures, Series, Spread, differ
from tracking.refuted import AGREED_DIGITS

MOST_NAMED = 8  # in one sentence: more are not read


def conclusions(comparison: Comparison) -> list[str]:
    """Sentences, each chosen by the figures; none is said of what was not measured."""
    sentences = [
        *_unfinished(comparison),
        *_fastest(comparison),
        *_least_memory(comparison),
        *_waiting(comparison),
        *_losses(comparison),
        *_front(comparison),
    ]
    if comparison.doubts:
        facts = named(list(dict.fromkeys(doubt.fact for doubt in comparison.doubts)))
        sentences.append(f"The runs are not alike in all that matters ({facts}): see the warnings.")
    return sentences


def named(labels: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; of many, the first."""
    if len(labels) > MOST_NAMED:
        labels = [*labels[: MOST_NAMED - 1], f"{len(labels) - MOST_NAMED + 1} others"]
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _unfinished(comparison: Comparison) -> list[str]:
    bad = [run for run in comparison.runs if run.state != "completed"]
    if not bad:
        return []
    states = named([f"{run.label} ({run.state})" for run in bad])
    return [f"Of {len(comparison.runs)} runs, {len(bad)} did not complete: {states}."]


def _with(comparison: Comparison, figure: str) -> list[Series]:
    return [one for one in comparison.series if figure in one.spreads]


def _fastest(comparison: Comparison) -> list[str]:
    timed = sorted(_with(comparison, "tokens_per_s"), key=lambda one: -one.spreads["tokens_per_s"].mean)
    if len(timed) < 2:
        return []
    first = timed[0]
    level = [one for one in timed[1:] if not differ(first.spreads["tokens_per_s"], one.spreads["tokens_per_s"])]
    speed = f"{first.spreads['tokens_per_s'].mean:,.0f} tokens/s"
    against = ""
    if "speed_up" in first.spreads and first.label != comparison.reference:
        times, share = first.spreads["speed_up"].mean, first.spreads["efficiency"].mean
        against = f", {times:.2f} times {comparison.reference}'s, a parallel efficiency of {share:.0%}"
    if level:
        labels = named([one.label for one in (first, *level)])
        return [f"{labels} are the fastest, at about {speed}: what they differ by lies within the spread."]
    return [f"{first.label} is the fastest at {speed} on {_devices(first.ranks)}{against}."]


def _devices(ranks: int | None) -> str:
    return "1 device" if ranks == 1 else f"{ranks} devices"


def _least_memory(comparison: Comparison) -> list[str]:
    held = sorted(_with(comparison, "peak_gib"), key=lambda one: one.spreads["peak_gib"].mean)
    if len(held) < 2:
        return []
    least, most = held[0], held[-1]
    low = least.spreads["peak_gib"]
    if not differ(low, most.spreads["peak_gib"]):
        return [f"No run needs less memory per device than another beyond the spread (about {low.mean:.2f} GiB)."]
    level = [one.label for one in held if not differ(low, one.spreads["peak_gib"])]
    verb = "needs" if len(level) == 1 else "need"
    other = next((one for one in held if one.label == comparison.reference and one.label not in level), most)
    share = 1 - low.mean / other.spreads["peak_gib"].mean
    sentence = (
        f"{named(level)} {verb} the least memory, {low.mean:.2f} GiB on the fullest device, "
        f"{share:.0%} less than {other.label}"
    )
    return [f"{sentence}{_price(comparison, level, least)}."]


def _price(comparison: Comparison, level: Sequence[str], least: Series) -> str:
    """What the least memory costs in speed."""
    timed = _with(comparison, "tokens_per_s")
    if len(timed) < 2 or least not in timed:
        return ""
    fastest = max(timed, key=lambda one: one.spreads["tokens_per_s"].mean)
    own = max((one for one in timed if one.label in level), key=lambda one: one.spreads["tokens_per_s"].mean)
    if own is fastest or not differ(own.spreads["tokens_per_s"], fastest.spreads["tokens_per_s"]):
        return ", and that costs no speed"
    lost = 1 - own.spreads["tokens_per_s"].mean / fastest.spreads["tokens_per_s"].mean
    who = f"of these {own.label} is the fastest," if len(level) > 1 else "it is"
    return f"; {who} {lost:.0%} slower than {fastest.label}"


def _waiting(comparison: Comparison) -> list[str]:
    waits = [(run.wait_share, run) for run in comparison.runs if run.wait_share is not None and (run.ranks or 1) > 1]
    if not waits:
        return []
    longest, most = max(waits, key=lambda pair: pair[0])
    shortest, least = min(waits, key=lambda pair: pair[0])
    if shortest == longest:
        return [f"{_whose(comparison, [run for _, run in waits])} waits {longest:.0%} of a step for other ranks."]
    return [
        f"{_whose(comparison, [most])} waits longest for other ranks, {longest:.0%} of a step; "
        f"{_whose(comparison, [least])} shortest, {shortest:.0%}."
    ]


def _losses(comparison: Comparison) -> list[str]:
    sentences = []
    diverged = [run for run in comparison.runs if run.diverged]
    if diverged:
        sentences.append(f"The loss of {_whose(comparison, diverged)} is no number at some steps.")
    others = [run for run in comparison.runs if run.loss_difference is not None and not _is_reference(comparison, run)]
    others = [run for run in others if run not in diverged]
    if others and not any(_is_reference(comparison, run) for run in diverged):
        sentences.append(_agreement(comparison, others))
    wrong = [run for run in comparison.runs if run.verdict == "disagrees"]
    right = [run for run in comparison.runs if run.verdict == "agrees"]
    refuted = [run for run in comparison.runs if run.verdict == "refuted"]
    if refuted:
        sentences.append(
            f"Certified, but refuted by their own losses: {_whose(comparison, refuted)}; see the warnings."
        )
    if wrong:
        sentences.append(f"Certified not to compute what one process computes: {_whose(comparison, wrong)}.")
    if right:
        sentences.append(f"Certified to compute what one process computes: {_whose(comparison, right)}.")
    return sentences


def _whose(comparison: Comparison, runs: Sequence[RunFigures]) -> str:
    """Names of the runs, repeats as one."""
    return named(list(dict.fromkeys(_series_of(comparison, run).label for run in runs)))


def _is_reference(comparison: Comparison, run: RunFigures) -> bool:
    return _series_of(comparison, run).label == comparison.reference


def _series_of(comparison: Comparison, run: RunFigures) -> Series:
    return next(one for one in comparison.series if any(comparison.runs[place] is run for place in one.runs))


def _agreement(comparison: Comparison, others: Sequence[RunFigures]) -> str:
    digits = [run.loss_digits or 0 for run in others]
    apart = [run for run, own in zip(others, digits, strict=True) if own < AGREED_DIGITS]
    worst = max(apart or others, key=lambda run: run.loss_difference or 0.0)
    where = f"{worst.loss_difference:.1e}, {worst.label} at step {worst.loss_difference_step}"
    fewest = min(run.compared_steps for run in others)
    steps = "the one step that both logged" if fewest == 1 else f"each of the {fewest} steps or more that both logged"
    if fewest == max(run.compared_steps for run in others) > 1:
        steps = f"each of the {fewest} steps that both logged"
    if not worst.loss_difference:
        return f"Training losses are the same as {comparison.reference}'s at {steps}, to the last bit."
    if apart:
        noise = _seed_noise(comparison, apart)
        whose = _whose(comparison, apart)
        return f"Training losses differ from {comparison.reference}'s in {whose} (most: {where}){noise}."
    return (
        f"Training losses agree with {comparison.reference}'s to {min(digits)} digits at {steps} "
        f"(largest difference: {where})."
    )


def _seed_noise(comparison: Comparison, apart: Sequence[RunFigures]) -> str:
    """Of repeats: whether final losses differ by more than other seeds make them differ."""
    ours = next(one for one in comparison.series if one.label == comparison.reference).spreads.get("train_loss")
    theirs = [_series_of(comparison, run).spreads.get("train_loss") for run in apart]
    found: list[Spread] = [spread for spread in theirs if spread is not None]
    if ours is None or ours.deviation is None or not found:
        return ""
    if any(differ(ours, spread) for spread in found):
        return ", at the end by more than the spread over seeds"
    return ", at the end by no more than the spread over seeds: no difference"


def _front(comparison: Comparison) -> list[str]:
    placed = [one for one in comparison.series if {"seconds_to_target", "peak_gib"} <= one.spreads.keys()]
    front = [one.label for one in placed if one.on_front]
    if len(placed) < 2 or comparison.target_loss is None:
        return []
    goal = f"the time to a training loss of {comparison.target_loss:.4g} and memory per device"
    if len(front) == 1:
        return [f"Weighing {goal}, {front[0]} is the choice: no other run is better in either."]
    others = "" if len(front) == len(placed) else "; every other run is matched or beaten in both"
    return [f"Weighing {goal}, the choice is between {named(front)}{others}."]
