"""Meter: step time, tokens/s, MFU, loss and peak memory, by the same code for every strategy."""

import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Protocol, cast, final

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from models.steps import steps_done
from tracking.record import Results
from tracking.steps import traced_steps, warmup_steps

WARMUP_RULE = "the first min(10, max(2, steps // 10)) optimizer steps are left out"
TRACED_RULE = f"{WARMUP_RULE}, and so are the steps that were traced"
PROFILED_RULE = ", and those in which a profiler ran"


@final
class Meter(pl.Callback):
    """Measures training, and logs a row every `log_every_steps` optimizer steps and at the last.

    Step time is the time from the end of an optimizer step to the end of the next: forward, backward, communication,
    the wait for data and our own logging are in it; validation is not, and a step after which a checkpoint was written
    is left out. Put it before every callback that reads `latest`.

    peak_flops: FLOP/s that one device can do (`measure_peak_flops`); the mean over the ranks is used.
    started_at: `time.time()` of the run's start, by default now.
    offers: called on every rank right before the optimizer step of each row, when gradients are whole and not yet
    clipped; what it returns joins the row (such as `optim/grad_norm`).
    loss_factor: by what the losses of the step that is over are to be multiplied, to add up to its mean.
    skipped_steps: how many optimizer steps have been left out so far, of a run that may leave out any; their losses are
    not averaged.
    trace_steps: how many steps a StepTracer traces; they are left out of the times, unless the run has no others.
    profiled: steps in which a profiler runs; they are always left out.
    """

    def __init__(
        self,
        *,
        samples_per_step: int,
        tokens_per_sample: int,
        log_every_steps: int,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        started_at: float | None = None,
        offers: Callable[[], Mapping[str, float | Tensor]] = dict,
        loss_factor: Callable[[], float] = lambda: 1.0,
        skipped_steps: Callable[[], int] | None = None,
        trace_steps: int = 0,
        profiled: Collection[int] = (),
    ) -> None:
        self.latest: dict[str, float] = {}
        self.logged_step = 0
        self._samples_per_step = samples_per_step
        self._tokens_per_sample = tokens_per_sample
        self._log_every_steps = log_every_steps
        self.flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._started_at = time.time() if started_at is None else started_at
        self._offers = offers
        self._loss_factor = loss_factor
        self._count_skipped = skipped_steps
        self._skipped_steps = 0
        self._trace_steps = trace_steps
        self._profiled = profiled
        self._laps: list[tuple[Any, Any]] = []
        self._step_s: list[float] = []
        self._peak_gib: list[float] = []
        self._val: dict[str, float] = {}
        self._wall_s = self._startup_s = 0.0
        self._offered: dict[str, float | Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        self._device = device
        self._world_size = trainer.world_size
        self._clock = clock_of(device)
        self._done = self.logged_step = steps_done(trainer)
        self._measured_from = self._done + warmup_steps(trainer.max_steps - self._done)
        traced = traced_steps(self._done + 1, trainer.max_steps, self._trace_steps)
        self._left_out = traced if trainer.max_steps - self._measured_from > len(traced) else range(0)
        # MPS has no float64; elsewhere it keeps the sum as exact as the losses are.
        self._loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._step_loss = torch.zeros_like(self._loss)
        self._averaged_steps = 0
        self._has_loss = False  # whether the step under way has given one
        self._gives_losses = False  # whether any has
        if self._peak_flops is not None:
            mine = torch.tensor(self._peak_flops, device=device)
            self._peak_flops = float(trainer.strategy.reduce(mine, reduce_op="mean"))
        self._startup_s = time.time() - self._started_at
        self._mark: Any = self._clock.mark()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # The rate is read here: when the step is over, the schedule has already moved on to the next step's.
        if self._is_due(trainer, steps_done(trainer) + 1):
            # Of several optimizers, which step one after the other, each has a number of its own but the first.
            place = next(n for n, one in enumerate(trainer.optimizers) if one is optimizer)
            found = {"optim/lr": float(optimizer.param_groups[0]["lr"]), **self._offers()}
            self._offered |= {f"{key}_{place + 1}" if place else key: value for key, value in found.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning hands out the loss divided by the accumulation: the sum over a step's micro-batches is its mean.
        # A step may return none: Lightning goes on, and hands out nothing.
        if outputs and "loss" in outputs:
            self._step_loss += outputs["loss"]
            self._has_loss = True
        if steps_done(trainer) == self._done:
            return
        self._end_loss()
        self._done = steps_done(trainer)
        self._end_step()
        if self._is_due(trainer, self._done):
            self._log(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning would write validation metrics under the number of finished steps minus one;
        # a logged "step" is its documented way to say otherwise.
        if not trainer.sanity_checking:
            pl_module.log("step", float(steps_done(trainer)), sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._val = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.latest.update(self._val)
        if trainer.state.fn == TrainerFn.FITTING:
            self._mark = self._clock.mark()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning has no hook for the end of a save: leave out the step that it falls into.
        self._mark = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_laps()
        _, self._peak_gib = self._share(trainer, self._loss)
        self._wall_s = time.time() - self._started_at

    def results(self) -> Results:
        """What the run reached and cost; to be called after `Trainer.fit`, on any rank."""
        p50, p95 = np.percentile(self._step_s, [50, 95]).tolist() if self._step_s else (None, None)
        return Results(
            steps=self._done,
            skipped_steps=self._skipped_steps,
            train_loss=self.latest.get("train/loss"),
            val_loss=self._val.get("val/loss"),
            val_metrics=self._val,
            tokens_per_s=p50 and self._tokens_per_s(p50),
            step_ms_p50=p50 and 1000 * p50,
            step_ms_p95=p95 and 1000 * p95,
            mfu=p50 and self._mfu(p50),
            peak_flops_per_device=self._peak_flops,
            peak_gib=self._peak_gib,
            memory_source=memory_source(self._device),
            warmup_rule=(TRACED_RULE if self._trace_steps else WARMUP_RULE) + (PROFILED_RULE if self._profiled else ""),
            wall_s=self._wall_s,
            startup_s=self._startup_s,
        )

    def _is_due(self, trainer: pl.Trainer, step: int) -> bool:
        return step % self._log_every_steps == 0 or step == trainer.max_steps

    def _end_loss(self) -> None:
        skipped = self._count_skipped() if self._count_skipped else 0
        if skipped == self._skipped_steps and self._has_loss:
            self._loss += self._step_loss * self._loss_factor()
            self._averaged_steps += 1
            self._gives_losses = True
        self._skipped_steps = skipped
        self._step_loss.zero_()
        self._has_loss = False

    def _end_step(self) -> None:
        now = self._clock.mark()
        counts = self._done > self._measured_from and self._done not in self._left_out
        if self._mark is not None and counts and self._done not in self._profiled:
            self._laps.append((self._mark, now))
        self._mark = now

    def _read_laps(self) -> list[float]:
        seconds = [self._clock.seconds(start, end) for start, end in self._laps]
        self._laps.clear()
        self._step_s += seconds
        return seconds

    def _log(self, trainer: pl.Trainer) -> None:
        loss, peaks_gib = self._share(trainer, self._loss / self._averaged_steps)  # NaN if all were left out
        # Of steps that optimize manually none need return a loss.
        row = {"train/loss": loss} if self._gives_losses or self._count_skipped else {}
        row["mem/peak_gib"] = max(peaks_gib)
        if self._count_skipped:
            row["train/skipped_steps"] = float(self._skipped_steps)
        self._loss.zero_()
        self._averaged_steps = 0
        self.logged_step = self._done
        if seconds := self._read_laps():
            median = float(np.median(seconds))
            row |= {"perf/step_ms": 1000 * median, "perf/tokens_per_s": self._tokens_per_s(median)}
            if (mfu := self._mfu(median)) is not None:
                row["perf/mfu"] = mfu
        row |= {key: float(value) for key, value in self._offered.items()}
        self.latest.update(row)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(row, self._done)
                logger.save()

    def _tokens_per_s(self, step_s: float) -> float:
        return self._samples_per_step * self._tokens_per_sample / step_s

    def _mfu(self, step_s: float) -> float | None:
        # Model FLOPs utilisation: PaLM (arXiv 2204.02311), appendix B.
        if self.flops_per_sample is None or self._peak_flops is None:
            return None
        return self.flops_per_sample * self._samples_per_step / step_s / (self._world_size * self._peak_flops)

    def _share(self, trainer: pl.Trainer, value: Tensor) -> tuple[float, list[float]]:
        """Mean of `value` (scalar) over the ranks, and peak GiB of each rank, by one mean over the ranks.

        Not `strategy.all_gather`, which in Lightning 2.6 goes through a function that torch 2.13 deprecates.
        """
        shared = torch.zeros(1 + trainer.world_size, dtype=self._loss.dtype, device=self._device)
        shared[0] = value
        shared[1 + trainer.global_rank] = peak_gib(self._device)
        mean, *shares = cast(Tensor, trainer.strategy.reduce(shared, reduce_op="mean")).tolist()
        return mean, [share * trainer.world_size for share in shares]


class Clock(Protocol):
    """Times a stretch of training between two marks."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


@final
class WallClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


@final
class CudaClock:
    """Marks are events in the stream, read only when a row is due: no step waits for the device."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else WallClock()


def memory_source(device: torch.device) -> Literal["cuda allocator", "resident set"]:
    """Where `peak_gib` reads from on this device."""
    return "cuda allocator" if device.type == "cuda" else "resident set"


def peak_gib(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: of the device on CUDA, else of the process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best square matmul in about 0.3 s: 8192 x 8192 on CUDA, 1024 x 1024 elsewhere.

    Call it on every rank at the same time, so that ranks that share cores or power see only their share.
    On CUDA it resets the allocator's peak, so that its own matrices are not counted as the run's.
    """
    size = 8192 if device.type == "cuda" else 1024
    # Random, because equal numbers draw less power, and a GPU then runs faster than it ever does in training.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = left @ right
    best, deadline = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    del left, right, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
