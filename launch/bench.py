"""What Concord's Trainer costs beside a bare loop, and what saving and tracing cost; interleaved in one run."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler

from launch.bare import BareDDP, BareDeepSpeed, BareLoop
from launch.bare_grid import bare_grid
from launch.checkpoints import Checkpoints
from launch.job import Job
from launch.worker import train
from models.steps import steps_done
from strategies.checkpoint import Manifest, checkpoints
from strategies.grid import Grid
from strategies.replicate import DDP
from strategies.zero import Zero
from tracking.tracing import StepTracer

WARMUP_STEPS = 3  # first steps build DDP's buckets, the optimizer's state and the allocator's pools


def loop_of(job: Job) -> tuple[BareLoop, str]:
    """The bare loop that trains as `job` does, and what it is called."""
    match job.strategy:
        case DDP():
            return BareDDP(job), "bare PyTorch"
        case Zero():
            return BareDeepSpeed(job), "bare DeepSpeed"
        case Grid():
            return bare_grid(job), "bare PyTorch"
    raise ValueError(f"bench has no bare loop for strategy={job.strategy.name}; choose ddp, or a zero or grid preset.")


def measure_overhead(job: Job) -> None:
    """Train `job` on this rank beside a bare loop; rank 0 prints both medians and their ratio."""
    if job.accumulation != 1 or job.config.precision.name != "fp32":
        raise ValueError("bench compares precision=fp32 with accumulation 1; leave them so.")
    bare, other = loop_of(job)
    train(job, callbacks=[bare])
    if int(os.environ["RANK"]) == 0:
        trainer_ms, bare_ms = (1e3 * statistics.median(times[WARMUP_STEPS:]) for times in (bare.trainer_s, bare.bare_s))
        print(
            f"{job.strategy.name} x {job.world_size}: {len(bare.bare_s) - WARMUP_STEPS} steps each, interleaved; "
            f"median step with Concord's Trainer {trainer_ms:.1f} ms, {other} {bare_ms:.1f} ms, "
            f"ratio {trainer_ms / bare_ms:.3f}",
            flush=True,
        )


CYCLE = 4  # optimizer steps from one checkpoint to the next: time enough to write one


class Saving(pl.Callback):
    """Has every other checkpoint written at once and the others asynchronously, and times what each takes.

    held_s: how long training was held by a save: till everything was written, or till it was copied.
    cost_s: by how much the steps from one checkpoint to the next took longer than as many undisturbed ones, which
    also tells what the writing beside them takes from them.
    """

    def __init__(self) -> None:
        self.held_s: dict[bool, list[float]] = {True: [], False: []}
        self.laps: list[tuple[bool, float]] = []  # of every step: of which kind the checkpoint before it was

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.callback = next(one for one in cast(Any, trainer).callbacks if isinstance(one, Checkpoints))
        self.write = self.callback.save
        self.callback.save = self.save  # type: ignore[method-assign]

    def save(self, trainer: pl.Trainer) -> None:
        writer = self.callback.writer
        writer.asynchronous = not writer.asynchronous
        writer.wait()  # of the one before: it had a whole cycle
        began = time.perf_counter()
        self.write(trainer)
        self.held_s[writer.asynchronous].append(time.perf_counter() - began)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        now = time.perf_counter()  # before this step's checkpoint, which falls into the next lap
        self.laps.append((self.callback.writer.asynchronous, now - self.mark))
        self.mark = now

    def cost_s(self, *, asynchronous: bool) -> list[float]:
        """The first two of each kind, when memory is new, are left out."""
        cycles = [self.laps[first : first + CYCLE] for first in range(CYCLE, len(self.laps) - CYCLE + 1, CYCLE)]
        plain = statistics.median(lap for cycle in cycles for _, lap in cycle[-1:])
        costs = [sum(lap for _, lap in cycle) - CYCLE * plain for cycle in cycles if cycle[0][0] is asynchronous]
        return costs[1:]


def measure_saving(job: Job) -> None:
    """Train `job` on this rank, saving both ways in turn; rank 0 prints what each takes."""
    saving = Saving()
    train(job, callbacks=[saving])
    if int(os.environ["RANK"]) == 0:
        sizes = [file.size for file in Manifest.read(checkpoints(job.run_dir)[-1]).files.values()]
        held, cost = (
            [1e3 * statistics.median(times(kind)) for kind in (False, True)]
            for times in (lambda kind: saving.held_s[kind][1:], lambda kind: saving.cost_s(asynchronous=kind))
        )
        print(
            f"{job.strategy.name} x {job.world_size}: checkpoints of {sum(sizes) / 1e6:.0f} MB; training is held for "
            f"{held[0]:.0f} ms by writing one at once, {held[1]:.0f} ms asynchronously, ratio {held[1] / held[0]:.3f}; "
            f"with what the writing takes from the next {CYCLE} steps {cost[0]:.0f} and {cost[1]:.0f} ms "
            f"(medians of {len(saving.held_s[True]) - 1})",
            flush=True,
        )


class Watching(pl.Callback):
    """Takes the StepTracer away for every other step, once it has traced its own, and times the steps."""

    def __init__(self) -> None:
        self.laps: dict[bool, list[float]] = {True: [], False: []}
        self.is_watched = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        everything, profiler = list(trainer.callbacks), cast(Any, trainer).profiler  # type: ignore[attr-defined]
        self.tracer = next(one for one in everything if isinstance(one, StepTracer))
        others = [one for one in everything if one is not self.tracer]
        self.choices = {True: (everything, profiler), False: (others, PassThroughProfiler())}
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        now = time.perf_counter()
        if steps_done(trainer) > self.tracer.steps[-1] + 1:
            self.laps[self.is_watched].append(now - self.mark)
            self.is_watched = not self.is_watched or steps_done(trainer) == trainer.max_steps - 1
            cast(Any, trainer).callbacks, cast(Any, trainer).profiler = self.choices[self.is_watched]
        self.mark = now


def measure_tracing(job: Job) -> None:
    """Train `job` on this rank, every other step without a tracer; rank 0 prints what one costs that does not trace."""
    watching = Watching()
    train(job, callbacks=[watching])
    if int(os.environ["RANK"]) == 0:
        watched_ms, plain_ms = (1e3 * statistics.median(watching.laps[kind]) for kind in (True, False))
        print(
            f"{job.strategy.name} x {job.world_size}: {len(watching.laps[True])} steps each, interleaved; median step "
            f"beside a tracer {watched_ms:.2f} ms, without {plain_ms:.2f} ms, ratio {watched_ms / plain_ms:.4f}",
            flush=True,
        )
