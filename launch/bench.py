"""What Concord's Trainer costs: its steps and those of a bare loop, interleaved in the same processes."""

from __future__ import annotations

import os
import statistics

from launch.bare import BareDDP, BareDeepSpeed, BareLoop
from launch.bare_grid import bare_grid
from launch.job import Job
from launch.worker import train
from strategies.grid import Grid
from strategies.replicate import DDP
from strategies.zero import Zero

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
