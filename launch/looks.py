"""profile= and debug= as callbacks of a rank."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback

from launch.schema import RunConfig
from strategies.engines.nonfinite import NanFinder
from strategies.engines.recorder import FlightRecorder
from tracking.profile import KinetoTrace, MemorySnapshot


def recorder_of(config: RunConfig, run_dir: Path, rank: int) -> FlightRecorder | None:
    """What records collectives, to be made before the process group."""
    if config.debug is None or config.debug.name != "flight_recorder":
        return None
    return FlightRecorder(run_dir, rank=rank, entries=config.debug.entries)


def profilers(config: RunConfig, run_dir: Path, traced: int) -> list[Callback]:
    """What profiles, to be put before the Meter; `traced` steps are a StepTracer's."""
    profile = config.profile
    if profile is None:
        return []
    steps = range(profile.first_step, profile.last_step + 1)
    if profile.name == "memory":
        return [MemorySnapshot(run_dir, steps, traced)]
    return [KinetoTrace(run_dir, steps, traced, shapes=profile.shapes, stacks=profile.stacks, memory=profile.memory)]


def nan_finders(config: RunConfig) -> list[Callback]:
    """What finds NaN, to be put behind the StepTracer, which watches a pipeline's steps, too."""
    return [NanFinder()] if config.debug is not None and config.debug.name == "nan" else []
