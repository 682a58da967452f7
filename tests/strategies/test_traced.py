"""Every preset under the tracer: the record has what its spec says of memory and traffic, the trace what was done."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from strategies.grid import Grid
from tests.agreement.training import job_of
from tests.presets import PRESETS
from tests.strategies.census import Count, Counted, check_memory, check_traffic, counted
from tests.strategies.counting import EVEN
from tests.tiers import in_tiers
from tracking.sources import Event, read_trace
from tracking.timeline import TracedStep
from tracking.tracing import StepTracer

# zero3_nvme needs a library that not every machine has.
TRACED = [path.stem for path in PRESETS if path.stem != "zero3_nvme"]
# One for each way in which an engine keeps what it holds: whole; flat, with a share of it stepped; each parameter cut,
# by DeepSpeed and by FSDP2; and by stages.
STAND_FOR_ENGINES = ("ddp", "zero2", "zero3", "fsdp", "pipeline")
GLOBAL_BATCH, ACCUMULATION = 16, 2
WORDS = [
    *EVEN,
    "trainer.max_steps=5",
    "trainer.val_every_steps=null",
    "data.max_val_samples=4",
    f"data.global_batch_size={GLOBAL_BATCH}",
    "logger=none",
    "launcher.accelerator=cpu",
]
ROUNDING_US = 0.01  # of the times in trace.json


class KeepsTraced(pl.Callback):
    """Writes down what a rank traced on its own clock, before it is laid beside that of the others."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (tracer,) = (callback for callback in trainer.callbacks if isinstance(callback, StepTracer))  # type: ignore[attr-defined]
        path = Path(trainer.default_root_dir) / f"raw{os.environ['RANK']}.json"
        path.write_text(json.dumps([step.model_dump() for step in tracer.traced]))


@pytest.fixture(scope="module")
def of_preset(tmp_path_factory: pytest.TempPathFactory) -> Count:
    """A run of a preset on as few ranks as it takes, made once for all tests that ask for it."""

    @cache
    def run(preset: str) -> Counted:
        folder = tmp_path_factory.mktemp("run")
        words = [*WORDS, f"strategy={preset}"]
        # Only the mesh tells what a data rank is to take at once.
        data_ranks = job_of([*words, "data.micro_batch_size=4"], folder).mesh.data_ranks
        batch = f"data.micro_batch_size={GLOBAL_BATCH // data_ranks // ACCUMULATION}"
        return counted([*words, batch], folder, KeepsTraced())

    return run


@pytest.fixture(scope="module", params=in_tiers(TRACED, STAND_FOR_ENGINES))
def run(request: pytest.FixtureRequest, of_preset: Count) -> Counted:
    return of_preset(request.param)


@pytest.fixture(scope="module")
def trace(run: Counted) -> Sequence[Event]:
    return read_trace(run.job.run_dir / "trace.json")


Raw = Sequence[Sequence[TracedStep]]  # of each rank, on its own clock


@pytest.fixture(scope="module")
def raw(run: Counted) -> Raw:
    told = [json.loads((run.job.run_dir / f"raw{rank}.json").read_text()) for rank in range(run.job.world_size)]
    return [[TracedStep.model_validate(step) for step in steps] for steps in told]


def test_each_category_of_memory_is_what_the_spec_says(run: Counted) -> None:
    check_memory(run)


def test_activations_are_those_of_one_process_and_its_samples(run: Counted, of_preset: Count) -> None:
    """Gathered weights are none: what a Linear keeps for backward is its input alone."""
    one_process = of_preset("single")
    per_sample = one_process.results.memory[0].activations / one_process.workload.micro_batch_size
    mesh = run.job.mesh.sizes
    for memory in run.results.memory:
        share = memory.activations / per_sample / run.workload.micro_batch_size
        if mesh["pipe"] == mesh["tensor"] == 1:
            assert share == pytest.approx(1, rel=0.02)
        else:  # of a stage, or of split matrices, and what goes between them
            assert 0 < share < 1


def test_traffic_is_what_the_spec_says(run: Counted, trace: Sequence[Event]) -> None:
    assert run.job.accumulation == ACCUMULATION
    check_traffic(run)
    for rank in range(run.job.world_size):
        events = [event for event in trace if event.rank == rank and event.category == "collective"]
        assert sum(event.details["bytes"] for event in events) == 2 * sum(run.sent(rank).values())


def test_each_rank_shows_forward_and_backward_of_each_micro_batch(run: Counted, trace: Sequence[Event]) -> None:
    assert run.results.traced_steps == [3, 4]
    spec = run.job.strategy
    cuts = spec.micro_batches if isinstance(spec, Grid) and spec.pipe > 1 else 1
    for rank in range(run.job.world_size):
        for category in ("forward", "backward"):
            found = [event for event in trace if (event.rank, event.category) == (rank, category)]
            assert [event.details["micro_batch"] for event in found] == 2 * list(range(ACCUMULATION * cuts))
            if cuts > 1:
                assert {event.details["stage"] for event in found} == {run.pipe_rank(rank)}
        for category, count in (("optimizer", 2), ("data", 2 * ACCUMULATION)):
            assert len([event for event in trace if (event.rank, event.category) == (rank, category)]) == count


def test_lanes_do_not_overlap(run: Counted, trace: Sequence[Event]) -> None:
    lanes: dict[tuple[int, int, bool], list[Event]] = defaultdict(list)
    for event in trace:
        lanes[event.rank, event.lane, event.category == "idle"].append(event)
    for lane in lanes.values():
        assert all(end_of(one) <= next_one.start + ROUNDING_US for one, next_one in pairwise(by_start(lane)))
    for rank in range(run.job.world_size):
        work = by_start(lanes[rank, 0, False])
        for wait in lanes[rank, 0, True]:  # in the middle of some work, or of none
            crossed = [
                one for one in work if one.start < end_of(wait) - ROUNDING_US and wait.start + ROUNDING_US < end_of(one)
            ]
            assert all(
                one.start <= wait.start + ROUNDING_US and end_of(wait) <= end_of(one) + ROUNDING_US for one in crossed
            )


def by_start(events: Iterable[Event]) -> list[Event]:
    return sorted(events, key=lambda event: (event.start, end_of(event)))


def end_of(event: Event) -> float:
    return event.start + event.duration


def test_events_lie_within_their_steps(trace: Sequence[Event], raw: Raw) -> None:
    zero = min(steps[0].begin for steps in raw)
    for rank, steps in enumerate(raw):
        times = [(1e6 * (step.begin - zero) - ROUNDING_US, 1e6 * (step.end - zero) + ROUNDING_US) for step in steps]
        for event in trace:
            if event.rank == rank:
                assert any(begin <= event.start and end_of(event) <= end for begin, end in times), event


def test_no_message_arrives_before_it_is_sent(run: Counted, raw: Raw) -> None:
    """A call is noted before it is made, and its end behind it.

    But each step's times hang on one reading of the machine's clock, and may be too early by its spread: so far those
    of the receiver are allowed to be.
    """
    for number in range(2):
        sent: dict[Any, list[float]] = defaultdict(list)
        received: dict[Any, list[float]] = defaultdict(list)
        for steps in raw:
            for call in steps[number].calls:
                if call.collective == "send":
                    sent[call.group, call.peer].append(call.called)
                elif call.collective == "recv":
                    received[call.group, call.peer].append(call.done + steps[number].spread)
        assert bool(sent) is (run.job.mesh.sizes["pipe"] != 1)
        # Groups of one name are apart, as are the pairs of ranks that one tag stands for in each of them.
        for name, begins in sent.items():
            assert all(begin <= end for begin, end in zip(sorted(begins), sorted(received[name]), strict=True)), name


TO_NEXT_STAGE = {"forward": 1, "backward": -1}


def test_no_stage_is_ahead_of_the_one_before(run: Counted, raw: Raw) -> None:
    """A stage notes that a part is over before it sends, and the next one when it has received and computed."""
    pipe_ranks = int(run.job.mesh.sizes["pipe"])
    ranks_of_stage = run.job.world_size // pipe_ranks
    for number in range(2):
        ends: dict[tuple[Any, ...], tuple[float, float]] = {}  # at the earliest and at the latest
        for rank, steps in enumerate(raw):
            for span in steps[number].spans:
                if span.stage is not None:
                    name = span.category, span.stage, span.micro_batch, rank % ranks_of_stage
                    ends[name] = span.end, span.end + steps[number].spread
        pairs = [
            (end, ends[category, stage + TO_NEXT_STAGE[category], *rest])
            for (category, stage, *rest), (end, _) in ends.items()
            if 0 <= stage + TO_NEXT_STAGE[category] < pipe_ranks
        ]
        assert len(pairs) * pipe_ranks == len(ends) * (pipe_ranks - 1)
        assert all(end < latest for end, (_, latest) in pairs)


def test_shares_are_shares(run: Counted) -> None:
    for waited, idle in zip(run.results.wait_share, run.results.idle_share, strict=True):
        assert 0 <= idle <= waited < 1
    if run.job.world_size == 1:
        assert run.results.wait_share == [0.0]
