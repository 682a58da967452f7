"""A traced run says what its ranks held, sent and did when: against blocks that sleep, and what the spec says."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import pytest

from launch.job import Job
from launch.worker import train
from strategies.grid import Grid
from tests.agreement.training import job_of, run_job
from tests.strategies.census import Counted, check_memory, check_traffic, counted
from tests.strategies.counting import DEEP_ODD
from tests.strategies.sleeping import Clock, Setting, SleepingBlocks
from tests.tiers import in_tiers
from tests.tracking.slow import Slow, fit
from tracking.comparison import compare_runs
from tracking.gantt import idle_share
from tracking.record import Results, RunRecord
from tracking.sources import Event, read_run, read_trace
from tracking.tracing import StepTracer, moment_of


def traced_run(words: list[str], folder: Path) -> tuple[Job, Results, list[Event]]:
    job = job_of(words, folder)
    run_job(job, train_rank, job)
    trace = read_trace(folder / "trace.json") if (folder / "trace.json").exists() else []
    return job, RunRecord.read(folder / "record.json").results, trace


def train_rank(job: Job) -> None:
    train(job, callbacks=[Clock()])


# --- what is held and sent ---

STRATEGIES = ["ddp", "fsdp"]  # all others, with more micro-batches, are traced in tests/strategies/test_traced.py


@pytest.fixture(scope="module", params=in_tiers(STRATEGIES, ["ddp"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    words = [*DEEP_ODD, "data.micro_batch_size=12", f"strategy={request.param}", "launcher.devices=2"]
    return counted(words, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trace(run: Counted) -> list[Event]:
    return read_trace(run.job.run_dir / "trace.json")


def test_each_category_of_memory_is_what_the_spec_says(run: Counted) -> None:
    assert run.job.accumulation == 1
    check_memory(run)


def test_categories_add_up_to_the_peak(run: Counted) -> None:
    results = run.results
    for memory, peak_gib in zip(results.memory, results.peak_gib, strict=True):
        assert sum(dict(memory).values()) == pytest.approx(peak_gib * 2**30, rel=0.01)
        assert memory.activations > 0
    assert results.memory_limit is not None and results.memory_limit > sum(results.peak_gib) * 2**30


def test_traffic_is_what_the_spec_says_and_the_trace_shows_it(run: Counted, trace: list[Event]) -> None:
    check_traffic(run)
    for rank, rows in enumerate(run.results.traffic):
        for row in rows:
            assert row.seconds is not None
            events = [
                event
                for event in trace
                if (event.rank, event.name, event.details.get("axis")) == (rank, row.collective, row.axis)
            ]
            assert len(events) == row.calls  # of one step
            assert sum(event.details["bytes"] for event in events) == row.payload
    # Ranks' clocks are known to fractions of a millisecond: a short collective may seem to be over before it began.
    assert sum(row.seconds or 0.0 for rows in run.results.traffic for row in rows) > 0


def test_the_last_step_of_a_short_run_is_traced_and_its_lanes_are_there(run: Counted, trace: list[Event]) -> None:
    assert run.results.traced_steps == [2]
    assert {event.rank for event in trace} == {0, 1}
    assert {event.category for event in trace if event.lane == 0} == {
        "data",
        "forward",
        "backward",
        "optimizer",
        "idle",
    }
    assert {event.category for event in trace if event.lane == 1} == {"collective"}


def test_what_each_rank_has_traced_goes_into_one_file(run: Counted) -> None:
    assert [path.name for path in run.job.run_dir.glob("trace*.json")] == ["trace.json"]


# --- when ---

FORWARD_S, STEPS = 0.06, 6
SLOW = 2.0  # times as long takes all on the second rank


class UnevenBlocks(SleepingBlocks):
    """One rank is slower than the other; a backward takes twice as long as a forward."""

    def __init__(self, net: Any, optimizer: Any, scheduler: object) -> None:
        super().__init__(net, optimizer, scheduler, FORWARD_S * (SLOW if os.environ["RANK"] == "1" else 1))


UNEVEN = [
    "model=vit_tiny",
    "model._target_=tests.tracking.test_tracing.UnevenBlocks",
    "model.net.num_layers=1",
    "data=digits",
    "data.global_batch_size=16",
    "data.micro_batch_size=4",
    "data.max_val_samples=8",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_steps=null",
    "logger=none",
    "launcher.devices=2",
    "launcher.accelerator=cpu",
]


@pytest.mark.alone
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_spans_are_as_long_as_what_is_done_in_them(strategy: str, tmp_path: Path) -> None:
    job, results, trace = traced_run([*UNEVEN, f"strategy={strategy}"], tmp_path)
    assert results.traced_steps == [3, 4]
    assert job.accumulation == 2
    for rank, forward_s in enumerate([FORWARD_S, FORWARD_S * SLOW]):
        spans = {category: of(trace, rank, category) for category in ("forward", "backward", "optimizer", "data")}
        assert [event.details["micro_batch"] for event in spans["forward"]] == [0, 1, 0, 1]
        assert len(spans["data"]) == 4 and len(spans["optimizer"]) == 2
        for category, seconds in (("forward", forward_s), ("backward", 2 * forward_s)):
            asleep = [event.duration - waited(event, of(trace, rank, "idle")) for event in spans[category]]
            # What else the machine does can only make it longer: the shortest counts.
            assert 1e-6 * min(asleep) == pytest.approx(seconds, abs=0.025), category


def waited(event: Event, waits: list[Event]) -> float:
    end = event.start + event.duration
    return sum(wait.duration for wait in waits if event.start <= wait.start < end)


def of(trace: list[Event], rank: int, category: str) -> list[Event]:
    return [event for event in trace if event.rank == rank and event.category == category]


@pytest.mark.alone
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_a_rank_that_waits_for_a_slower_one_is_idle_as_long(strategy: str, tmp_path: Path) -> None:
    _, results, _ = traced_run([*UNEVEN, f"strategy={strategy}"], tmp_path)
    fast, slow = results.wait_share
    assert fast == pytest.approx(1 - 1 / SLOW, abs=0.1)
    assert slow < 0.1
    assert results.idle_share[0] == pytest.approx(fast, abs=0.05)
    assert results.idle_share[1] < 0.05


SETTINGS = [
    Setting(schedule="1f1b", ranks=2, micro_batches=1),
    *(Setting(schedule=schedule, ranks=2, micro_batches=4) for schedule in ("1f1b", "gpipe", "interleaved_1f1b")),
]


@pytest.mark.alone
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_pipelines_idle_share_is_its_bubble(setting: Setting, tmp_path: Path) -> None:
    words = [word for word in setting.overrides if not word.startswith("evidence")]
    job, results, trace = traced_run([*words, "trainer.max_steps=6"], tmp_path)
    ends = json.loads((tmp_path / "ends.json").read_text())
    laps = [end - begin for begin, end in pairwise([0.0, *ends])]
    traced_s = sum(laps[step - 1] for step in results.traced_steps)
    measured = 1 - setting.work_s * len(results.traced_steps) / traced_s
    assert isinstance(job.strategy, Grid)
    gantt = compare_runs([read_run(tmp_path)]).runs[0].gantt
    drawn = [idle_share(gantt, rank) for rank in range(2)]
    for share in (*results.idle_share, *drawn):
        assert share == pytest.approx(job.strategy.bubble(), abs=0.04)
        # What else a step takes, such as Lightning's work, is no idling.
        assert measured - 0.1 < share < measured + 0.02
    for rank in range(2):
        for category in ("forward", "backward"):
            events = of(trace, rank, category)
            done = [(event.details["stage"], event.details["micro_batch"]) for event in events]
            stages = range(rank, 2 * setting.rank_stages, 2)
            assert sorted(done) == sorted(2 * list(product(stages, range(setting.micro_batches))))
            seconds = setting.block_s * (1 if category == "forward" else 2)
            # The median: one of them may have had to wait for a core.
            assert 1e-6 * median(event.duration for event in events) == pytest.approx(seconds, rel=0.25)


SINGLE = [*DEEP_ODD, "data.micro_batch_size=24", "strategy=single", "launcher.devices=1"]


@pytest.mark.full
def test_a_run_may_go_untraced(tmp_path: Path) -> None:
    _, results, trace = traced_run([*SINGLE, "trainer.trace_steps=0"], tmp_path)
    assert trace == []
    assert (results.memory, results.traffic, results.wait_share, results.traced_steps) == ([], [], [], [])
    assert "traced" not in results.warmup_rule


@pytest.mark.full
def test_one_process_is_traced_too(tmp_path: Path) -> None:
    _, results, trace = traced_run(SINGLE, tmp_path)
    assert results.traced_steps == [2] and results.traffic == [[]] and results.wait_share == [0.0]
    assert of(trace, 0, "forward") and not of(trace, 0, "collective")


BUSY_S = 0.02


class BusyMachine:
    """A clock of a process that has to give way to another while it is read, but for once."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> float:
        self.marks += 1
        if self.marks != 2:
            time.sleep(BUSY_S)
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_two_clocks_are_read_together_when_the_process_is_not_interrupted() -> None:
    began, began_mark = time.time(), time.perf_counter()
    moment = moment_of(BusyMachine())
    assert moment.spread_s < BUSY_S
    assert moment.seconds - began == pytest.approx(moment.mark - began_mark, abs=BUSY_S / 2)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning")
def test_a_step_that_is_not_traced_costs_less_than_a_millisecond_more(tmp_path: Path) -> None:
    """1 % of a 100 ms step; most of it is Lightning's, which calls every hook of every callback."""

    def seconds(folder: Path, *callbacks: pl.Callback) -> float:
        start = time.process_time()
        fit(folder, Slow(), *callbacks, max_steps=300)
        return time.process_time() - start

    turns = range(3)
    bare = min(seconds(tmp_path / f"bare{turn}") for turn in turns)
    mesh = {"pipe": 1, "data": 1, "tensor": 1}
    watched = min(seconds(tmp_path / f"watched{turn}", StepTracer(tmp_path, mesh, count=0)) for turn in turns)
    assert (watched - bare) / 300 < 0.001
