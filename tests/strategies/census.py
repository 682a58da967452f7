"""Runs whose ranks are counted while they train: what each held and sent, beside what its strategy says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import pytest

from launch import worker
from launch.job import Job
from models.stats import ModelStats
from strategies import grid_costs
from strategies.grid import Grid
from strategies.grid_layout import Layout
from strategies.spec import Memory, Traffic, Workload
from tests.agreement.training import job_of, run_job
from tests.strategies.counting import stats_of
from tracking.record import Results, RunRecord
from tracking.timeline import place_of

CATEGORIES = ("parameters", "gradients", "optimizer", "buffers")
Kind = tuple[str, str, int]  # collective, mesh axis and size of the group


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A run, what its ranks were counted to hold and to send by the tracer that every run has, and what is said of it.

    A grid says it of each pipe rank, the others of all ranks at once: their only pipe rank is 0.
    """

    job: Job
    stats: ModelStats
    workload: Workload
    results: Results

    def pipe_rank(self, rank: int) -> int:
        return place_of(rank, {axis: int(size) for axis, size in self.job.mesh.sizes.items()})[0]

    @property
    def ranks(self) -> Mapping[int, Sequence[int]]:
        """By pipe rank."""
        all_of_them = range(self.job.world_size)
        by_pipe_rank = sorted({self.pipe_rank(rank) for rank in all_of_them})
        return {pipe: [rank for rank in all_of_them if self.pipe_rank(rank) == pipe] for pipe in by_pipe_rank}

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

    def said(self, pipe_rank: int) -> dict[Kind, int]:
        """What a rank is said to send in a step, in bytes."""
        return {(sent.collective, sent.axis, sent.ranks): sent.payload for sent in self.traffic(pipe_rank)}

    def sent(self, rank: int) -> dict[Kind, float]:
        """What a rank really sent in a step, in bytes."""
        return {(row.collective, row.axis, row.ranks): row.payload for row in self.results.traffic[rank]}

    def held(self, pipe_rank: int, category: str) -> int:
        """The most that a rank really held, in bytes."""
        return max(getattr(self.results.memory[rank], category) for rank in self.ranks[pipe_rank])


def train_rank(job: Job, stats: ModelStats, callbacks: Sequence[pl.Callback]) -> None:
    worker.train(job, callbacks=callbacks, stats=stats)


def counted(words: Sequence[str], folder: Path, *callbacks: pl.Callback) -> Counted:
    job = job_of([*words], folder)
    stats = stats_of(job)
    with pytest.MonkeyPatch.context() as patch:
        # Seconds for each product in bfloat16 on a CPU that has no instructions for them; nothing here depends on it.
        patch.setattr(worker, "measure_peak_flops", lambda *_: 1e9)
        run_job(job, train_rank, job, stats, callbacks)
    workload = Workload(
        precision=job.config.precision,
        accumulation=job.accumulation,
        micro_batch_size=job.data.micro_batch_size,
        moments=1 if "optimizer=sgd" in words else 2,
    )
    results = RunRecord.read(folder / "record.json").results
    return Counted(job=job, stats=stats, workload=workload, results=results)


Count = Callable[..., Counted]


def counting_once(folders: pytest.TempPathFactory, words_of: Callable[..., Sequence[str]]) -> Count:
    """A run of what `words_of` makes of its arguments, made once for all tests that ask for it."""
    return cache(lambda *run: counted(words_of(*run), folders.mktemp("run")))


def check_memory(run: Counted, held: Callable[[int, str], int] | None = None) -> None:
    """Each category is within 2 % of what is said.

    held: bytes by pipe rank and category, where more is known of them than what the tracer has counted.
    """
    assert len(run.results.memory) == run.job.world_size
    for pipe_rank in run.ranks:
        expected = run.memory(pipe_rank)
        for category in CATEGORIES:
            most = (held or run.held)(pipe_rank, category)
            assert most == pytest.approx(getattr(expected, category), rel=0.02, abs=64), (category, pipe_rank)


def check_traffic(run: Counted) -> None:
    """Each collective's bytes are within 1 % of what is said, and there are no others.

    Left out are norms, flags, a pipeline's loss and logs, how far each rank's data has come.
    """
    assert len(run.results.traffic) == run.job.world_size
    for pipe_rank, ranks in run.ranks.items():
        expected = run.said(pipe_rank)
        for rank in ranks:
            sent = run.sent(rank)
            for kind, payload in expected.items():
                assert sent[kind] == pytest.approx(payload, rel=0.01), (kind, rank)
            others = sum(payload for kind, payload in sent.items() if kind not in expected)
            assert others <= 0.01 * sum(expected.values()), rank
