"""profile=: what torch's profilers see of some optimizer steps, a file per rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

from models.steps import steps_done
from tracking.steps import check_untraced, traced_steps


def profile_path(run_dir: Path, rank: int, suffix: str) -> Path:
    return run_dir / "profile" / f"rank{rank}{suffix}"


def check_steps(trainer: pl.Trainer, disturbed: range, trace_steps: int) -> None:
    """ValueError if a run that goes on has one of these steps behind it, or a StepTracer times one of them."""
    if steps_done(trainer) >= disturbed.start:
        raise ValueError(
            f"profile.first_step: the run goes on behind step {steps_done(trainer)}; set profile.first_step="
            f"{steps_done(trainer) + 2} or higher."
        )
    traced = traced_steps(steps_done(trainer) + 1, trainer.max_steps, trace_steps)
    check_untraced(disturbed, traced, trainer.max_steps)


def tell(trainer: pl.Trainer, path: Path, tool: str) -> None:
    if trainer.is_global_zero and path.exists():
        others = f" (and of {trainer.world_size - 1} more)" if trainer.world_size > 1 else ""
        trainer.print(f"profile: {path}{others}, to be opened in {tool}")


@final
class KinetoTrace(pl.Callback):
    """What CPU and GPU do in `steps`, which torch's schedule warms up for one step before.

    In the trace, `ProfilerStep#5` is optimizer step 5. Put it before the Meter, so that writing falls into the last.
    """

    def __init__(
        self, run_dir: Path, steps: range, trace_steps: int, *, shapes: bool, stacks: bool, memory: bool
    ) -> None:
        self.run_dir, self.steps, self.trace_steps = run_dir, steps, trace_steps
        self.shapes, self.stacks, self.memory = shapes, stacks, memory
        self.profiler: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_steps(trainer, range(self.steps.start - 1, self.steps.stop), self.trace_steps)
        self.path = profile_path(self.run_dir, trainer.global_rank, ".json.gz")
        self.done = steps_done(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.profiler is None and steps_done(trainer) + 2 == self.steps.start:
            self.profiler = self.started(trainer)

    def started(self, trainer: pl.Trainer) -> profile:
        activities = [ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on the terminal when it begins and ends
        profiler = profile(
            activities=activities,
            schedule=schedule(wait=self.steps.start - 1, warmup=1, active=len(self.steps), repeat=1),
            on_trace_ready=lambda made: made.export_chrome_trace(str(self.path)),
            record_shapes=self.shapes,
            with_stack=self.stacks,
            profile_memory=self.memory,
        )
        profiler.step_num = self.steps.start - 1  # of the schedule, and in the trace: an optimizer step
        profiler.current_action = ProfilerAction.WARMUP
        profiler.start()
        return profiler

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.profiler is None or steps_done(trainer) == self.done:
            self.done = steps_done(trainer)
            return
        self.done = steps_done(trainer)
        self.profiler.step()
        if self.done == self.steps[-1]:
            self.stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tell(trainer, self.path, "https://ui.perfetto.dev")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stop()  # what there is of the steps is written

    def stop(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None


@final
class MemorySnapshot(pl.Callback):
    """Every allocation of the CUDA allocator in `steps`, with its stack; also if the run fails in one of them.

    The recipe is torch's (docs.pytorch.org/docs/stable/torch_cuda_memory.html).
    """

    def __init__(self, run_dir: Path, steps: range, trace_steps: int) -> None:
        self.run_dir, self.steps, self.trace_steps = run_dir, steps, trace_steps
        self.is_recording = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_steps(trainer, self.steps, self.trace_steps)
        self.path = profile_path(self.run_dir, trainer.global_rank, ".pickle")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.is_recording and steps_done(trainer) + 1 == self.steps.start:
            torch.cuda.memory._record_memory_history()
            self.is_recording = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if steps_done(trainer) == self.steps[-1]:
            self.stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tell(trainer, self.path, "https://pytorch.org/memory_viz")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.is_recording:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self.path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.is_recording = False
