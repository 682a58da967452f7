"""What ranks traced apart comes together: on one clock, calls with those of others, and in sums."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tracking.record import Memory
from tracking.timeline import RankTrace, Span, Timeline, TracedCall, TracedStep, axis_of, joined, without

MESH = {"pipe": 1, "data": 2, "tensor": 1}


def call(called: float, done: float, **changes: Any) -> TracedCall:
    values: dict[str, Any] = {
        "collective": "all_reduce",
        "group": "0",
        "payload_bytes": 100,
        "called": called,
        "done": done,
        "waited_since": None,
        "peer": None,
    }
    return TracedCall(**values | changes)


def trace(
    rank: int, *calls: TracedCall, waits: Sequence[tuple[float, float]] = (), ahead: float = 0.0, **changes: Any
) -> RankTrace:
    """A step from second 10 to 20 of a rank whose clock is ahead, on a machine of its own if it is."""
    step = TracedStep(
        step=3,
        begin=10 + ahead,
        end=20 + ahead,
        spans=[Span(category="forward", begin=11 + ahead, end=15 + ahead, micro_batch=0)],
        waits=list(waits),
        calls=list(calls),
    )
    values: dict[str, Any] = {
        "rank": rank,
        "node": int(ahead != 0),
        "moments": [30 + ahead, 31 + ahead, 32.5 + ahead],
        "memory": Memory(parameters=1, gradients=1, optimizer=1, buffers=1, activations=1, other=1),
        "memory_limit": 1000 - rank,
        "groups": {"0": (0, 1), "other": (0, 1)},
        "steps": [step],
    }
    return RankTrace(**values | changes)


def events(timeline: Timeline, rank: int, category: str) -> list[tuple[float, float]]:
    """Begin and duration in seconds."""
    found = [event for event in timeline.events() if event["pid"] == rank and event.get("cat") == category]
    return [(event["ts"] / 1e6, event["dur"] / 1e6) for event in found]


def test_a_collective_is_under_way_once_its_last_rank_has_called_it() -> None:
    early = trace(0, call(12, 17), waits=[(12, 17)])
    late = trace(1, call(16, 17), waits=[(16, 17)])
    timeline = Timeline([early, late], MESH)
    assert events(timeline, 0, "collective") == events(timeline, 1, "collective") == [(6, 1)]
    assert timeline.results()["wait_share"] == pytest.approx([0.5, 0.1])
    assert timeline.results()["idle_share"] == pytest.approx([0.4, 0.0])
    assert timeline.results()["memory_limit"] == 999
    assert timeline.results()["traced_steps"] == [3]
    (row,) = timeline.traffic(0)
    assert (row.collective, row.axis, row.ranks, row.calls, row.payload, row.seconds) == (
        "all_reduce",
        "data",
        2,
        1,
        100,
        1,
    )


def test_calls_of_a_group_are_told_apart_by_their_order_and_groups_by_their_names() -> None:
    one = trace(0, call(11, 12), call(13, 14, group="other"), call(15, 18))
    two = trace(1, call(11, 12), call(16, 18), call(19, 19.5, group="other"))
    timeline = Timeline([one, two], MESH)
    assert timeline.under_way[0][0] == [(11, 12), (14, 14), (16, 18)]
    assert timeline.traffic(0)[0].calls == 3
    assert timeline.traffic(0)[0].seconds == 3


def test_a_message_is_under_way_from_its_send_until_it_is_there() -> None:
    sender = trace(0, call(14, 20, collective="send", peer=(0, 1, 7)))
    receiver = trace(1, call(10, 15, collective="recv", peer=(0, 1, 7), waited_since=10))
    timeline = Timeline([sender, receiver], MESH)
    assert timeline.under_way[0] == [[(14, 15)], [(14, 15)]]


def test_a_message_that_nobody_had_to_wait_for_takes_no_time() -> None:
    sender = trace(0, call(11, 20, collective="send", peer=(0, 1, 7)))
    receiver = trace(1, call(10, 15.0001, collective="recv", peer=(0, 1, 7), waited_since=15))
    timeline = Timeline([sender, receiver], MESH)
    assert timeline.under_way[0] == [[(11, 11)], [(11, 11)]]


def test_clocks_of_other_machines_are_set_right() -> None:
    here = trace(0, call(12, 17), waits=[(12, 17)])
    there = trace(1, call(1016, 1017), waits=[(1016, 1017)], ahead=1000)
    timeline = Timeline([here, there], MESH)
    assert timeline.offsets == [0, 1000]
    assert timeline.results()["idle_share"] == pytest.approx([0.4, 0.0])
    assert events(timeline, 0, "forward") == events(timeline, 1, "forward") == [(1, 4)]


def test_work_begins_behind_the_wait_for_what_it_needs(tmp_path: Path) -> None:
    timeline = Timeline([trace(0, waits=[(11.0005, 12), (13, 13.5)])], MESH)
    assert events(timeline, 0, "forward") == [(2, 3)]
    assert events(timeline, 0, "idle") == [(pytest.approx(1.0005), pytest.approx(0.9995)), (3, 0.5)]
    timeline.write(tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 2 + 3


@pytest.mark.parametrize(
    ("ranks", "axis"),
    [((0, 1), "tensor"), ((0, 2), "data"), ((1, 5), "pipe"), ((0, 3), "mixed"), (tuple(range(8)), "mixed")],
)
def test_a_group_lies_along_an_axis(ranks: tuple[int, ...], axis: str) -> None:
    assert axis_of(ranks, {"pipe": 2, "data": 2, "tensor": 2}) == axis


def test_all_ranks_lie_along_the_only_axis() -> None:
    assert axis_of((0, 1, 2, 3), {"pipe": 1, "data": 4, "tensor": 1}) == "data"


def test_collectives_that_overlap_have_lanes_of_their_own() -> None:
    timeline = Timeline([trace(0, call(11, 14), call(12, 16), call(13, 15), call(14, 18))], MESH)
    lanes = {event["ts"]: event["tid"] for event in timeline.events() if event.get("cat") == "collective"}
    assert lanes == {1e6: 1, 2e6: 2, 3e6: 3, 4e6: 1}
    names = [event["args"]["name"] for event in timeline.events() if event["name"] == "thread_name"]
    assert names == ["compute", "communication 1", "communication 2", "communication 3"]


def test_many_ranks_are_laid_side_by_side_in_seconds() -> None:
    """Each call is looked at once per rank that made it, not once per pair of its ranks."""
    ranks, calls = 512, 40
    groups = {"0": tuple(range(ranks))}
    made = [
        trace(rank, *(call(11 + i / 10, 11.05 + i / 10) for i in range(calls)), groups=groups) for rank in range(ranks)
    ]
    start = time.process_time()
    timeline = Timeline(made, {"pipe": 1, "data": ranks, "tensor": 1})
    assert time.process_time() - start < 2
    assert timeline.under_way[0][ranks - 1][0] == (11, 11.05)


def test_intervals_are_joined_and_cut() -> None:
    assert joined([(3, 4), (0, 1), (1, 2), (5, 5), (3.5, 6)]) == [(0, 2), (3, 6)]
    assert without([(0, 2), (3, 6)], [(1, 3.5), (4, 5)]) == [(0, 1), (3.5, 4), (5, 6)]
    assert without([(0, 2)], []) == [(0, 2)]
