"""StepTracer: what each rank does when in a few steps of a run, what it sends meanwhile, and what it holds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.optim import Optimizer

from models.steps import steps_done
from strategies.engines.grid import GridEngine
from strategies.schedules import Kind, Step
from tracking.memory import MemoryCensus
from tracking.meter import Clock, clock_of, peak_gib
from tracking.record import host_memory
from tracking.steps import traced_steps, warmup_steps
from tracking.timeline import RankTrace, Span, Timeline, TracedCall, TracedStep, trace_path
from tracking.traffic import CollectiveTimer

FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # what Lightning 2.6 calls it
BARRIERS = 5  # by which the clocks of several machines are compared
READINGS = 5  # of two clocks of one machine, of which the closest counts
# Of a schedule's steps, what is work; a backward's first half is one to those who wait for it.
WORK: Mapping[Kind, str] = {"F": "forward", "B": "backward", "I": "backward", "W": "weight"}


class Steps(Protocol):
    """An engine that shows what its optimizer really steps with."""

    stepping: Optimizer


class Moment(NamedTuple):
    """A moment on two clocks: seconds since the epoch, and a mark that was made then or up to `spread_s` later."""

    seconds: float
    mark: Any
    spread_s: float


def moment_of(clock: Clock) -> Moment:
    """Now.

    Where all cores are busy, another process may come between two readings, for tens of milliseconds: a step that began
    with them would lie too early by as much, and what it received would have arrived before it was sent.
    """
    moments = []
    for _ in range(READINGS):
        seconds, mark = time.time(), clock.mark()
        clock.seconds(mark, mark)  # on CUDA: waits until the stream has come to the mark
        moments.append(Moment(seconds, mark, time.time() - seconds))
    return min(moments, key=lambda moment: moment.spread_s)


class Stretch(NamedTuple):
    """A Span in the marks of the clock."""

    category: str
    begin: Any
    end: Any
    micro_batch: int | None = None
    stage: int | None = None


@final
class StepTracer(pl.Callback):
    """Traces `count` optimizer steps behind the warm-up, and counts memory in the warm-up's last.

    Rank 0 finds them in `results`, as fields of a record's Results, and writes trace.json; other steps are left alone.
    Put it before the Meter, so that what it does at a step's end falls into that step.

    A step begins when its first samples are asked for. Forwards, backwards and the wait for data are what Lightning's
    profiler is told of, in a pipeline the schedule's steps; the optimizer's work is from behind the last backward, so
    clipping is in it. On CUDA all times are those of the device.
    """

    def __init__(self, run_dir: Path, mesh: Mapping[str, int], count: int) -> None:
        self.run_dir, self.mesh, self.count = run_dir, mesh, count
        self.results: dict[str, Any] = {}
        self.traced: list[TracedStep] = []
        self.groups: dict[str, tuple[int, ...]] = {}  # ranks by the names of their process groups
        self.census: MemoryCensus | None = None
        self.timer: CollectiveTimer | None = None  # while a step is traced
        self.is_counting = False  # while memory is

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        cast(Any, trainer).profiler = _Actions(self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer, self.engine = trainer, trainer.strategy
        first, last = steps_done(trainer) + 1, trainer.max_steps
        self.steps = traced_steps(first, last, self.count)
        self.counted_step = min(first + warmup_steps(last - first + 1) - 1, last) if self.steps else None
        self.clock = clock_of(self.engine.root_device)
        self.stages = self.engine.steps if isinstance(self.engine, GridEngine) else None
        if self.stages:
            self.stages.pipeline.around = self.around

    # --- one step ---------------------------------------------------------------------------------------------------

    def begins(self, action: str) -> None:
        """Something begins that Lightning's profiler is told of."""
        if action == FETCH and not self.timer and not self.is_counting:
            self.start(steps_done(self.trainer) + 1)
        if self.timer and action in self.actions:
            self.open[action] = self.clock.mark(), len(self.timer.calls)

    def ends(self, action: str) -> None:
        if not self.timer or action not in self.open:
            return
        begin, first_call = self.open.pop(action)
        end, category = self.clock.mark(), self.actions[action]
        if category == "forward":
            self.micro_batch += 1
        if category == "backward":
            self.backwards.append((first_call, len(self.timer.calls), end))
        if category == "optimizer":
            begin = self.stepping_since or begin
        if not (self.stages and category in ("forward", "backward")):  # there, each step of the schedule is told apart
            of_micro_batch = self.micro_batch if category in ("forward", "backward") else None
            self.stretches.append(Stretch(category, begin, end, of_micro_batch))

    def start(self, step: int) -> None:
        if step == self.counted_step:
            stepping = cast(Steps, self.engine).stepping
            self.census = MemoryCensus(self.engine, self.trainer.lightning_module, stepping)
            self.census.__enter__()
            self.is_counting = True
        if step not in self.steps:
            return
        engine, module = type(self.engine).__name__, type(self.trainer.lightning_module).__name__
        self.actions = {
            FETCH: "data",
            f"[Strategy]{engine}.training_step": "forward",
            f"[Strategy]{engine}.backward": "backward",
            f"[LightningModule]{module}.optimizer_step": "optimizer",
        }
        self.open: dict[str, tuple[Any, int]] = {}
        self.stretches: list[Stretch] = []
        self.backwards: list[tuple[int, int, Any]] = []  # first and last call in each, and its end
        self.step, self.micro_batch, self.stepping_since = step, -1, None
        if self.engine.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.origin = moment_of(self.clock)
        self.timer = CollectiveTimer(self.clock.mark)
        self.timer.__enter__()

    @contextmanager
    def around(self, step: Step) -> Iterator[None]:
        """Of a pipeline's steps."""
        begin = self.clock.mark() if self.timer else None
        yield
        if self.census and self.is_counting:
            self.census.sample()
        if not self.timer or step.kind not in WORK or not self.stages:
            return
        micro_batch = (self.micro_batch + 1) * self.stages.spec.micro_batches + step.micro
        self.stretches.append(Stretch(WORK[step.kind], begin, self.clock.mark(), micro_batch, step.stage))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.census and self.is_counting:
            self.census.is_reducing = False  # the micro-batch before, of the same step, has reduced nothing

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.census and self.is_counting:
            self.census.sample()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.census and self.is_counting:
            self.census.is_reducing = True

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.census and self.is_counting:
            self.census.is_reducing = False
            self.census.sample()  # of a step that is left out, the optimizer sees no gradient
        if self.timer:
            self.stepping_since = self.clock.mark()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.timer and steps_done(trainer) == self.step:
            self.finish()
        if self.is_counting and steps_done(trainer) == self.counted_step:
            self.leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.leave()

    def leave(self) -> None:
        """Leave operators as they are."""
        if self.timer:
            self.timer.__exit__(None, None, None)
        if self.census and self.is_counting:
            self.census.__exit__(None, None, None)
        self.timer, self.is_counting = None, False

    def finish(self) -> None:
        end, timer = self.clock.mark(), cast(CollectiveTimer, self.timer)
        self.leave()

        def at(mark: Any) -> float:
            return self.origin.seconds + self.clock.seconds(self.origin.mark, mark)

        self.groups |= {call.group: call.ranks for call in timer.calls}
        waits = [(at(wait.begin), at(wait.end)) for wait in timer.waits]
        for first, last, backward_end in self.backwards:
            # DDP's reducer waits in C++, behind the last of a backward's collectives, for all of them.
            pending = [call for call in timer.unwaited(first, last) if call.done is not None]
            if pending:
                called = max(at(call.returned) for call in pending)
                over = min(max(at(call.done) for call in pending), at(backward_end))
                waits.append((called, max(called, over)))
        self.traced.append(
            TracedStep(
                step=self.step,
                begin=self.origin.seconds,
                end=at(end),
                spread=self.origin.spread_s,
                spans=[
                    Span(**part._asdict() | {"begin": at(part.begin), "end": at(part.end)}) for part in self.stretches
                ],
                waits=waits,
                calls=[
                    TracedCall(
                        collective=call.collective,
                        group=call.group,
                        payload_bytes=call.payload_bytes,
                        called=at(call.called),
                        done=at(end if call.done is None else call.done),
                        waited_since=None if call.waited_since is None else at(call.waited_since),
                        peer=call.peer,
                    )
                    for call in timer.calls
                ],
            )
        )

    # --- the run's end ----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(self.traced) < len(self.steps) or not self.traced:
            return  # the run was stopped before
        device = self.engine.root_device
        on_gpu = device.type == "cuda"
        moments = []
        for _ in range(BARRIERS):
            self.engine.barrier()
            moments.append(time.time())
        mine = RankTrace(
            rank=trainer.global_rank,
            node=trainer.node_rank,
            moments=moments,
            memory=self.census and self.census.counted(int(peak_gib(device) * 2**30)),
            memory_limit=torch.cuda.get_device_properties(device).total_memory if on_gpu else host_memory(),
            groups=self.groups,
            steps=self.traced,
        )
        path = trace_path(self.run_dir, trainer.global_rank)
        with telling_why_not():
            path.write_text(mine.model_dump_json())
        self.engine.barrier()
        if trainer.is_global_zero:
            with telling_why_not():
                timeline = Timeline(RankTrace.load_all(self.run_dir, trainer.world_size), self.mesh)
                timeline.write(self.run_dir / "trace.json")
                self.results = timeline.results()
        self.engine.barrier()
        path.unlink(missing_ok=True)


@contextmanager
def telling_why_not() -> Iterator[None]:
    """A run does not fail by its trace: it is about to save what it has trained."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.stderr.write(f"the traced steps cannot be kept: {error}\n")


@final
class _Actions(PassThroughProfiler):
    """Hands on what Lightning tells its profiler."""

    def __init__(self, tracer: StepTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def start(self, action_name: str) -> None:
        if self.tracer.timer is not None or action_name == FETCH:
            self.tracer.begins(action_name)

    def stop(self, action_name: str) -> None:
        if self.tracer.timer is not None:
            self.tracer.ends(action_name)
