"""Every preset under the tracer: the record has what its spec says of memory and traffic, the trace what was done."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from launch.job import Job
from launch.worker import train
from models.stats import ModelStats
from strategies import grid_costs
from strategies.grid import Grid
from strategies.grid_layout import Layout
from strategies.spec import Memory, Traffic, Workload
from tests.agreement.training import job_of, run_job
from tests.presets import PRESETS
from tests.strategies.counting import EVEN, stats_of
from tests.tiers import in_tiers
from tracking.record import Results, RunRecord
from tracking.sources import Event, read_trace
from tracking.timeline import TracedStep, place_of
from tracking.tracing import StepTracer

# zero3_nvme needs a library that not every machine has.
TRACED = [path.stem for path in PRESETS if path.stem != "zero3_nvme"]
# One for each way in which an engine keeps what it holds: whole; flat, with a share of it stepped; each parameter cut,
# by DeepSpeed and by FSDP2; and all axes at once.
STAND_FOR_ENGINES = ("ddp", "zero2", "zero3", "fsdp", "3d")
GLOBAL_BATCH, ACCUMULATION = 16, 2
WORDS = [
    *EVEN,
    "trainer.max_steps=6",
    "trainer.val_every_steps=null",
    "data.max_val_samples=4",
    f"data.global_batch_size={GLOBAL_BATCH}",
    "logger=none",
    "launcher.accelerator=cpu",
]
ROUNDING_US = 0.01  # of the times in trace.json


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A run of a preset, on as few ranks as it takes, and what each of them has traced."""

    job: Job
    stats: ModelStats
    workload: Workload
    results: Results
    trace: Sequence[Event]
    raw: Sequence[Sequence[TracedStep]]

    def pipe_rank(self, rank: int) -> int:
        return place_of(rank, {axis: int(size) for axis, size in self.job.mesh.sizes.items()})[0]

    def memory(self, pipe_rank: int) -> Memory:
        spec = self.job.strategy
        if isinstance(spec, Grid):
            return grid_costs.rank_memory(Layout(spec, self.stats), self.workload, pipe_rank)
        return spec.memory(self.stats, self.workload)

    def traffic(self, pipe_rank: int) -> Traffic:
        spec = self.job.strategy
        if isinstance(spec, Grid):
            return grid_costs.rank_traffic(Layout(spec, self.stats), self.workload, pipe_rank)
        return spec.traffic(self.stats, self.workload)


class KeepsTraced(pl.Callback):
    """Writes down what a rank traced on its own clock, before it is laid beside that of the others."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (tracer,) = (callback for callback in trainer.callbacks if isinstance(callback, StepTracer))  # type: ignore[attr-defined]
        path = Path(trainer.default_root_dir) / f"raw{os.environ['RANK']}.json"
        path.write_text(json.dumps([step.model_dump() for step in tracer.traced]))


def train_rank(job: Job, stats: ModelStats) -> None:
    train(job, callbacks=[KeepsTraced()], stats=stats)


def traced(words: Sequence[str], folder: Path) -> Traced:
    # Only the mesh tells what a data rank is to take at once.
    data_ranks = job_of([*words, "data.micro_batch_size=4"], folder).mesh.data_ranks
    micro = GLOBAL_BATCH // data_ranks // ACCUMULATION
    job = job_of([*words, f"data.micro_batch_size={micro}"], folder)
    stats = stats_of(job)
    run_job(job, train_rank, job, stats)
    raw = [json.loads((folder / f"raw{rank}.json").read_text()) for rank in range(job.world_size)]
    return Traced(
        job=job,
        stats=stats,
        workload=Workload(precision=job.config.precision, accumulation=job.accumulation, micro_batch_size=micro),
        results=RunRecord.read(folder / "record.json").results,
        trace=read_trace(folder / "trace.json"),
        raw=[[TracedStep.model_validate(step) for step in steps] for steps in raw],
    )


@pytest.fixture(scope="module", params=in_tiers(TRACED, STAND_FOR_ENGINES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return traced([*WORDS, f"strategy={request.param}"], tmp_path_factory.mktemp("run"))


def test_each_category_of_memory_is_what_the_spec_says(run: Traced) -> None:
    assert len(run.results.memory) == run.job.world_size
    for pipe_rank in {run.pipe_rank(rank) for rank in range(run.job.world_size)}:
        held = [memory for rank, memory in enumerate(run.results.memory) if run.pipe_rank(rank) == pipe_rank]
        expected = run.memory(pipe_rank)
        for category in ("parameters", "gradients", "optimizer", "buffers"):
            most = max(getattr(memory, category) for memory in held)
            assert most == pytest.approx(getattr(expected, category), rel=0.02, abs=64), (category, pipe_rank)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return traced([*WORDS, "strategy=single"], tmp_path_factory.mktemp("single"))


def test_activations_are_those_of_one_process_and_its_samples(run: Traced, one_process: Traced) -> None:
    """Gathered weights are none: what a Linear keeps for backward is its input alone."""
    per_sample = one_process.results.memory[0].activations / one_process.workload.micro_batch_size
    mesh = run.job.mesh.sizes
    for memory in run.results.memory:
        share = memory.activations / per_sample / run.workload.micro_batch_size
        if mesh["pipe"] == mesh["tensor"] == 1:
            assert share == pytest.approx(1, rel=0.02)
        else:  # of a stage, or of split matrices, and what goes between them
            assert 0 < share < 1


def test_traffic_is_what_the_spec_says(run: Traced) -> None:
    assert run.job.accumulation == ACCUMULATION
    assert len(run.results.traffic) == run.job.world_size
    for rank, rows in enumerate(run.results.traffic):
        counted = {(row.collective, row.axis, row.ranks): row for row in rows}
        expected = {(sent.collective, sent.axis, sent.ranks): sent for sent in run.traffic(run.pipe_rank(rank))}
        for key, sent in expected.items():
            assert counted[key].payload == pytest.approx(sent.payload, rel=0.01), key
        # Left out by the spec: norms, flags, a pipeline's loss and logs.
        others = sum(row.payload for key, row in counted.items() if key not in expected)
        assert others <= 0.01 * sum(sent.payload for sent in expected.values())
        events = [event for event in run.trace if event.rank == rank and event.category == "collective"]
        assert sum(event.details["bytes"] for event in events) == 2 * sum(row.payload for row in rows)


def test_each_rank_shows_forward_and_backward_of_each_micro_batch(run: Traced) -> None:
    assert run.results.traced_steps == [3, 4]
    spec = run.job.strategy
    cuts = spec.micro_batches if isinstance(spec, Grid) and spec.pipe > 1 else 1
    for rank in range(run.job.world_size):
        for category in ("forward", "backward"):
            found = [event for event in run.trace if (event.rank, event.category) == (rank, category)]
            assert [event.details["micro_batch"] for event in found] == 2 * list(range(ACCUMULATION * cuts))
            if cuts > 1:
                assert {event.details["stage"] for event in found} == {run.pipe_rank(rank)}
        for category, count in (("optimizer", 2), ("data", 2 * ACCUMULATION)):
            assert len([event for event in run.trace if (event.rank, event.category) == (rank, category)]) == count


def test_lanes_do_not_overlap(run: Traced) -> None:
    lanes: dict[tuple[int, int, bool], list[Event]] = defaultdict(list)
    for event in run.trace:
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


def test_events_lie_within_their_steps(run: Traced) -> None:
    zero = min(steps[0].begin for steps in run.raw)
    for rank, steps in enumerate(run.raw):
        times = [(1e6 * (step.begin - zero) - ROUNDING_US, 1e6 * (step.end - zero) + ROUNDING_US) for step in steps]
        for event in run.trace:
            if event.rank == rank:
                assert any(begin <= event.start and end_of(event) <= end for begin, end in times), event


def test_no_message_arrives_before_it_is_sent_and_no_stage_is_ahead_of_the_one_before(run: Traced) -> None:
    for number in range(2):
        sent: dict[Any, list[float]] = defaultdict(list)
        received: dict[Any, list[float]] = defaultdict(list)
        for steps in run.raw:
            for call in steps[number].calls:
                if call.peer is not None:
                    (sent if call.collective == "send" else received)[call.group, call.peer].append(
                        call.called if call.collective == "send" else call.done
                    )
        # Groups of one name are apart, as are the pairs of ranks that one tag stands for in each of them.
        for name, begins in sent.items():
            assert all(begin <= end for begin, end in zip(sorted(begins), sorted(received[name]), strict=True)), name
    if isinstance(run.job.strategy, Grid) and run.job.strategy.pipe > 1:
        ends = {
            (event.category, event.details["stage"], event.rank % (run.job.world_size // 2), place): end_of(event)
            for category in ("forward", "backward")
            for rank in range(run.job.world_size)
            for place, event in enumerate(e for e in run.trace if (e.rank, e.category) == (rank, category))
        }
        for (category, stage, other, place), end in ends.items():
            later = ends.get((category, stage + (1 if category == "forward" else -1), other, place))
            assert later is None or later > end


def test_shares_are_shares(run: Traced) -> None:
    for waited, idle in zip(run.results.wait_share, run.results.idle_share, strict=True):
        assert 0 <= idle <= waited < 1
    if run.job.world_size == 1:
        assert run.results.wait_share == [0.0]
