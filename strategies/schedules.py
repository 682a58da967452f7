"""Pipeline schedules as data: which rank computes what in which order, what it sends to whom, how long all takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Name = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]  # fmt: skip
Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]


class Step(NamedTuple):
    """One thing that a rank does: forward F, backward B, or a backward's halves: I to the inputs, W to the weights.

    RECV_F is of the stage that takes the activations, RECV_B of the stage that takes the gradients; SEND_F and SEND_B
    are of the stage that gives them.
    """

    kind: Kind
    stage: int
    micro: int


Order = list[list[Step]]  # of each rank


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A kind of schedule, and what it asks for."""

    source: str  # the paper
    stages_per_rank: int | None  # None: any number from 2 on
    v_shaped: bool = False  # a rank's second stage counts from the end: rank 0 has the first and the last
    splits_backward: bool = False
    generator: str | None = None  # torch's class that lists the steps; None: listed here


SCHEDULES: Mapping[Name, Schedule] = {
    "gpipe": Schedule(source="Huang et al. 2019", stages_per_rank=1),
    "1f1b": Schedule(source="Narayanan et al. 2019", stages_per_rank=1),
    "interleaved_1f1b": Schedule(
        source="Narayanan et al. 2021", stages_per_rank=None, generator="ScheduleInterleaved1F1B"
    ),
    "looped_bfs": Schedule(source="Lamy-Poirier 2023", stages_per_rank=None, generator="ScheduleLoopedBFS"),
    "interleaved_zero_bubble": Schedule(
        source="Qi et al. 2023, ZB1P",
        stages_per_rank=None,
        splits_backward=True,
        generator="ScheduleInterleavedZeroBubble",
    ),
    "zbv": Schedule(
        source="Qi et al. 2024, ZB-V",
        stages_per_rank=2,
        v_shaped=True,
        splits_backward=True,
        generator="ScheduleZBVZeroBubble",
    ),
    "dualpipev": Schedule(
        source="DeepSeek-AI 2025, cut in half",
        stages_per_rank=2,
        v_shaped=True,
        splits_backward=True,
        generator="ScheduleDualPipeV",
    ),
}


def rank_of(stage: int, ranks: int, schedule: Schedule) -> int:
    """The pipe rank that holds a stage."""
    if schedule.v_shaped:
        return stage if stage < ranks else 2 * ranks - 1 - stage
    return stage % ranks


def gpipe(ranks: int, micro_batches: int) -> Order:
    """All forwards, then all backwards."""
    return [[Step(kind, rank, micro) for kind in ("F", "B") for micro in range(micro_batches)] for rank in range(ranks)]


def one_forward_one_backward(ranks: int, micro_batches: int) -> Order:
    """A rank runs ahead by as many forwards as there are ranks after it, then alternates."""
    order = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        steps = [Step("F", rank, micro) for micro in range(ahead)]
        for micro in range(micro_batches - ahead):
            steps += [Step("F", rank, micro + ahead), Step("B", rank, micro)]
        steps += [Step("B", rank, micro) for micro in range(micro_batches - ahead, micro_batches)]
        order.append(steps)
    return order


def forward_only(ranks: int, stages: int, micro_batches: int, schedule: Schedule) -> Order:
    """What validation runs: every stage of a rank on all micro-batches, first stage first."""
    return [
        [
            Step("F", stage, micro)
            for stage in range(stages)
            if rank_of(stage, ranks, schedule) == rank
            for micro in range(micro_batches)
        ]
        for rank in range(ranks)
    ]


def done_before(step: Step, stages: int) -> list[set[Step]]:
    """What must be over before a step can start: of each set, any one."""
    match step.kind:
        case "F":
            return [{Step("F", step.stage - 1, step.micro)}] if step.stage else []
        case "W":
            return [{Step("I", step.stage, step.micro)}]
        case "B" | "I":
            own = [{Step("F", step.stage, step.micro)}]
            if step.stage + 1 == stages:
                return own
            return [*own, {Step("B", step.stage + 1, step.micro), Step("I", step.stage + 1, step.micro)}]
    raise AssertionError(step)


def with_transfers(order: Order, stages: int, rank_of_stage: Callable[[int], int]) -> Order:
    """The order with every send and receive in its place.

    Both are put where the sender is done, in one pass over all ranks: so the lists are those of a sequential run, in
    which no receive comes before its send, and two ranks list what passes between them in the same order. Blocking
    receives and sends that do not block can therefore not wait for each other in a circle.
    """
    todo = [list(steps) for steps in order]
    lists: Order = [[] for _ in order]
    over: set[Step] = set()
    while any(todo):
        before = len(over)
        for rank, steps in enumerate(todo):
            if steps and all(over & choices for choices in done_before(steps[0], stages)):
                step = steps.pop(0)
                over.add(step)
                lists[rank].append(step)
                forward = step.kind == "F"
                to = step.stage + (1 if forward else -1)
                if step.kind != "W" and 0 <= to < stages and rank_of_stage(to) != rank:
                    lists[rank].append(Step("SEND_F" if forward else "SEND_B", step.stage, step.micro))
                    lists[rank_of_stage(to)].append(Step("RECV_F" if forward else "RECV_B", to, step.micro))
        assert len(over) > before, "a schedule whose steps wait for each other"
    return lists


def makespan(order: Order, stages: int, duration: Callable[[Step], float]) -> float:
    """Time from the first step's start to the last one's end, transfers being free."""
    todo = [list(steps) for steps in order]
    free_at = [0.0] * len(order)
    ended: dict[Step, float] = {}
    while any(todo):
        before = len(ended)
        for rank, steps in enumerate(todo):
            while steps:
                needed = [choices & ended.keys() for choices in done_before(steps[0], stages)]
                if not all(needed):
                    break
                step = steps.pop(0)
                start = max([free_at[rank], *(ended[choice] for choices in needed for choice in choices)])
                free_at[rank] = ended[step] = start + duration(step)
        assert len(ended) > before, "a schedule whose steps wait for each other"
    return max(free_at)


def bubble(order: Order, stages: int, forward: Sequence[float]) -> float:
    """Share of the ranks' time in which they wait, from 0 to 1.

    forward: time of a forward of each stage. A backward takes twice as long, half of it for the inputs: as many
    products of matrices each (Kaplan et al. 2020, section 2.1).
    """
    times: Mapping[str, float] = {"F": 1, "B": 2, "I": 1, "W": 1}

    def duration(step: Step) -> float:
        return times[step.kind] * forward[step.stage]

    busy = sum(duration(step) for steps in order for step in steps)
    return 1 - busy / (len(order) * makespan(order, stages, duration))
