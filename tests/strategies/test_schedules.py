"""Schedules as lists: complete, in an order that can be carried out, with every message sent and taken, and as idle as
their papers say."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from strategies.engines.pipeline import order_of
from strategies.schedules import (
    SCHEDULES,
    Name,
    Order,
    Step,
    bubble,
    done_before,
    forward_only,
    gpipe,
    makespan,
    rank_of,
    with_transfers,
)

MICRO_BATCHES = (1, 3, 4, 6, 8)


class Setting(NamedTuple):
    schedule: Name
    ranks: int
    rank_stages: int
    micro_batches: int

    @property
    def stages(self) -> int:
        return self.ranks * self.rank_stages

    @property
    def order(self) -> Order:
        return order_of(self.schedule, self.ranks, self.rank_stages, self.micro_batches)

    @property
    def forward(self) -> Order:
        return forward_only(self.ranks, self.stages, self.micro_batches, SCHEDULES[self.schedule])

    @property
    def bubble(self) -> float:
        return bubble(self.order, self.stages, [1.0] * self.stages)

    def rank_of(self, stage: int) -> int:
        return rank_of(stage, self.ranks, SCHEDULES[self.schedule])

    def __str__(self) -> str:
        return f"{self.schedule}-{self.ranks}x{self.rank_stages}-{self.micro_batches}"


def settings() -> Iterator[Setting]:
    for (name, kind), ranks, micro_batches in itertools.product(SCHEDULES.items(), (2, 4), MICRO_BATCHES):
        for rank_stages in (kind.stages_per_rank,) if kind.stages_per_rank else (2, 3):
            if name != "dualpipev" or micro_batches >= ranks * rank_stages:  # it takes no fewer
                yield Setting(name, ranks, rank_stages, micro_batches)


ALL = list(settings())
every_setting = pytest.mark.parametrize("setting", ALL, ids=str)


@every_setting
def test_every_micro_batch_goes_once_through_every_stage_and_back(setting: Setting) -> None:
    steps = list(itertools.chain(*setting.order))
    assert len(set(steps)) == len(steps)
    for stage, micro in itertools.product(range(setting.stages), range(setting.micro_batches)):
        kinds = {step.kind for step in steps if (step.stage, step.micro) == (stage, micro)}
        splits = SCHEDULES[setting.schedule].splits_backward
        assert kinds == {"F", "B"} or (splits and kinds == {"F", "I", "W"})
    assert {(step.stage, step.micro) for step in steps} == set(
        itertools.product(range(setting.stages), range(setting.micro_batches))
    )


@every_setting
def test_rank_computes_its_own_stages(setting: Setting) -> None:
    for order in (setting.order, setting.forward):
        for rank, steps in enumerate(order):
            assert {step.stage for step in steps} == {
                stage for stage in range(setting.stages) if setting.rank_of(stage) == rank
            }


def test_v_shaped_schedule_gives_the_first_rank_both_ends() -> None:
    assert [rank_of(stage, 4, SCHEDULES["zbv"]) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [rank_of(stage, 4, SCHEDULES["interleaved_1f1b"]) for stage in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


@every_setting
def test_validation_runs_every_forward_once(setting: Setting) -> None:
    steps = sorted(itertools.chain(*setting.forward))
    assert steps == [
        Step("F", stage, micro)
        for stage, micro in itertools.product(range(setting.stages), range(setting.micro_batches))
    ]


def with_messages(setting: Setting, order: Order) -> Order:
    return with_transfers(order, setting.stages, setting.rank_of)


def is_message(step: Step) -> bool:
    return step.kind.startswith(("SEND", "RECV"))


def sent_as(step: Step) -> Step:
    """The send of a message, whichever of its two ends `step` is."""
    match step.kind:
        case "RECV_F":
            return Step("SEND_F", step.stage - 1, step.micro)
        case "RECV_B":
            return Step("SEND_B", step.stage + 1, step.micro)
    return step


def between(setting: Setting, lists: Order, rank: int, other: int) -> list[Step]:
    """The messages between two ranks, as one of them lists them."""

    def ends(step: Step) -> set[int]:
        send = sent_as(step)
        to = send.stage + (1 if send.kind == "SEND_F" else -1)
        return {setting.rank_of(send.stage), setting.rank_of(to)}

    return [sent_as(step) for step in lists[rank] if is_message(step) and ends(step) == {rank, other}]


@every_setting
def test_two_ranks_list_what_passes_between_them_in_the_same_order(setting: Setting) -> None:
    for order in (setting.order, setting.forward):
        lists = with_messages(setting, order)
        assert [[step for step in steps if not is_message(step)] for steps in lists] == order
        for rank, other in itertools.combinations(range(setting.ranks), 2):
            assert between(setting, lists, rank, other) == between(setting, lists, other, rank)


@every_setting
def test_every_boundary_between_ranks_is_crossed_once_each_way(setting: Setting) -> None:
    boundaries = [stage for stage in range(setting.stages - 1) if setting.rank_of(stage) != setting.rank_of(stage + 1)]
    lists = with_messages(setting, setting.order)
    for direction, steps in (("SEND", 0), ("RECV", 1)):
        found = sorted(step for step in itertools.chain(*lists) if step.kind.startswith(direction))
        assert found == sorted(
            Step(f"{direction}_{kind}", stage + forward, micro)  # type: ignore[arg-type]
            for stage, micro in itertools.product(boundaries, range(setting.micro_batches))
            for kind, forward in (("F", steps), ("B", 1 - steps))
        )


def carry_out(lists: Order, stages: int) -> None:
    """Do the lists of all ranks, sends not blocking and receives blocking; AssertionError if a step lacks something."""
    todo = [list(steps) for steps in lists]
    at_hand: list[set[Step]] = [set() for _ in lists]  # what a rank has computed, or been sent the result of
    sent: set[Step] = set()
    while any(todo):
        moved = False
        for steps, known in zip(todo, at_hand, strict=True):
            while steps and (not steps[0].kind.startswith("RECV") or sent_as(steps[0]) in sent):
                moved = True
                step = steps.pop(0)
                own = {Step(kind, step.stage, step.micro) for kind in ("F", "B", "I")}
                match step.kind:
                    case "SEND_F" | "SEND_B":
                        sent.add(step)
                        assert known & (own - {Step("F", *step[1:])} if step.kind == "SEND_B" else own), step
                    case "RECV_F":
                        known.add(Step("F", step.stage - 1, step.micro))
                    case "RECV_B":
                        assert Step("F", step.stage, step.micro) in known, step  # its output says what shapes come
                        known.add(Step("B", step.stage + 1, step.micro))
                    case _:
                        assert all(known & choices for choices in done_before(step, stages)), step
                        known.add(step)
        assert moved, "ranks wait for each other"


@every_setting
def test_ranks_that_keep_to_their_lists_come_to_an_end(setting: Setting) -> None:
    for order in (setting.order, setting.forward):
        carry_out(with_messages(setting, order), setting.stages)


def test_message_left_out_of_a_list_is_noticed() -> None:
    lists = with_transfers(gpipe(2, 2), 2, lambda stage: stage)
    lists[1] = [step for step in lists[1] if step != Step("RECV_F", 1, 1)]
    with pytest.raises(AssertionError, match="F"):
        carry_out(lists, 2)


def test_steps_that_wait_for_each_other_are_no_schedule() -> None:
    backwards = [[Step("B", 0, 0), Step("F", 0, 0)], [Step("F", 1, 0), Step("B", 1, 0)]]
    with pytest.raises(AssertionError, match="wait for each other"):
        with_transfers(backwards, 2, lambda stage: stage)
    with pytest.raises(AssertionError, match="wait for each other"):
        makespan(backwards, 2, lambda _: 1.0)


# --- how long ranks wait ----------------------------------------------------------------------------------------------


def published(setting: Setting) -> float:
    """Share of p ranks' time in a step of m micro-batches, v stages on each: (p - 1) / (v m + p - 1).

    Huang et al. 2019, section 2.3, for v = 1; Narayanan et al. 2021, section 2.2, as a share of the ideal time instead.
    """
    ahead = setting.ranks - 1
    return ahead / (setting.rank_stages * setting.micro_batches + ahead)


@pytest.mark.parametrize("setting", [one for one in ALL if one.schedule in ("gpipe", "1f1b")], ids=str)
def test_bubble_is_as_published(setting: Setting) -> None:
    assert setting.bubble == pytest.approx(published(setting))


IN_ROUNDS = [
    one for one in ALL if one.schedule in ("interleaved_1f1b", "looped_bfs") and one.micro_batches % one.ranks == 0
]


@pytest.mark.parametrize("setting", IN_ROUNDS, ids=str)
def test_bubble_of_interleaved_stages_is_as_published(setting: Setting) -> None:
    assert setting.bubble == pytest.approx(published(setting))
    assert setting.bubble < published(setting._replace(rank_stages=1))


@pytest.mark.parametrize("setting", [one for one in ALL if SCHEDULES[one.schedule].splits_backward], ids=str)
def test_split_backwards_fill_the_bubble_of_1f1b(setting: Setting) -> None:
    assert setting.bubble < Setting("1f1b", setting.ranks, 1, setting.micro_batches).bubble


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_v_shaped_schedules_with_micro_batches_enough_only_wait_at_the_ends(schedule: Name, ranks: int) -> None:
    """A half of a stage's backward takes a forward's time: ranks - 1 of 6 x micro-batches + ranks - 1 such times."""
    for micro_batches in (2 * ranks, 3 * ranks):
        expected = (ranks - 1) / (6 * micro_batches + ranks - 1)
        assert Setting(schedule, ranks, 2, micro_batches).bubble == pytest.approx(expected)


def test_one_micro_batch_leaves_all_ranks_but_one_idle() -> None:
    for ranks in (2, 4):
        assert Setting("gpipe", ranks, 1, 1).bubble == pytest.approx(1 - 1 / ranks)
        assert Setting("gpipe", ranks, 1, 1).order == Setting("1f1b", ranks, 1, 1).order


def test_slowest_stage_sets_the_pace() -> None:
    order = order_of("1f1b", 2, 1, 4)
    # Of 4 micro-batches through stages of 1 and 3: one forward of the first, 4 x 9 of the second, the first's backward.
    assert makespan(order, 2, lambda step: (1 if step.kind == "F" else 2) * (1, 3)[step.stage]) == 1 + 4 * 9 + 2
    assert bubble(order, 2, (1.0, 3.0)) == pytest.approx(1 - 4 * 3 * (1 + 3) / (2 * 39))
    assert bubble(order, 2, (1.0, 3.0)) > bubble(order, 2, (2.0, 2.0))


def test_1f1b_keeps_no_more_micro_batches_than_there_are_stages_ahead() -> None:
    for rank, steps in enumerate(order_of("1f1b", 4, 1, 12)):
        held = list(itertools.accumulate(1 if step.kind == "F" else -1 for step in steps))
        assert max(held) == 4 - rank
    assert max(itertools.accumulate(1 if step.kind == "F" else -1 for step in gpipe(4, 12)[0])) == 12
