"""Ends a run that hangs: a thread per rank notices, leaves all stacks and where it stands, and asks the others to."""

from __future__ import annotations

import faulthandler
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, final

import lightning.pytorch as pl

from launch.dispatch import EXIT_FAILED
from launch.failure import Failure
from launch.hang import Standing, ended_path, is_reported, judge, read_standings
from launch.job import COLLECTIVE_MARGIN_S
from launch.output import log_path
from models.steps import steps_done
from strategies.engines.issued import collectives_issued, set_timeouts, waits_in_call

POLL_S = 0.5  # also how soon the others hear of it
GRACE_S = 5.0  # for the others to answer; a thread needs a second at most, a shared file system some more

# Where the innermost frame of a rank lies that waits for others; what it then calls is C++, and lets threads run.
WAITING = (
    "torch/distributed/",
    "torch/autograd/",
    "torch/cuda/",
    "torch/_tensor.py",
    "deepspeed/comm/",
    "strategies/engines/",  # a pipeline's receives, say
)
LIBRARIES = (*{sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}, "<frozen")


@final
class Watchdog(pl.Callback):
    """Beats at every hook that shows progress, and watches its own beats from a thread.

    When there was none for `startup_timeout_s`, or from this rank's third step on for `timeout_s`, on this rank or on
    another, all ranks write their stacks to `ranks/<n>.log`, where they stand to `ranks/<n>.hang.json`, and end. A rank
    whose interpreter is held cannot; C code then writes its stacks alone.

    terminal: where the one line goes that says which rank hangs, if there is no dispatcher to say it.
    leave_more: called when the run hangs, once its stacks are written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        startup_timeout_s: float,
        timeout_s: float,
        terminal: TextIO | None = None,
        leave_more: Callable[[], None] | None = None,
    ) -> None:
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.startup_timeout_s, self.timeout_s = startup_timeout_s, timeout_s
        self.terminal, self.leave_more = terminal, leave_more
        self.allowed_s = startup_timeout_s  # the one that holds now
        self.batches = 0  # begun by this process
        self.beats = 0
        self.during = "set-up"
        self.stopped = threading.Event()

    # --- the thread -------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the thread that calls this until the block is left, or `stop` is called."""
        self.main = threading.get_ident()
        path = log_path(self.run_dir, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            thread = threading.Thread(target=self.watch, args=(log,), name="watchdog", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self.stop()
                thread.join()

    def stop(self) -> None:
        """Answer no longer: what this rank still does, no other waits for."""
        self.leave()
        self.stopped.set()

    def leave(self) -> None:
        if self.world_size > 1:
            with suppress(OSError):  # the disk may be full
                ended_path(self.run_dir, self.rank).touch()

    def watch(self, log: TextIO) -> None:
        seen, silent_s, before = self.beats, 0.0, time.monotonic()
        try:
            while not self.stopped.wait(POLL_S):
                # Of a time in which this thread did not run either (all ranks stopped for a while), little counts.
                now = time.monotonic()
                elapsed_s, before = min(now - before, 2 * POLL_S), now
                # Read before the beats, because it changes after one: no silence is held against a later limit.
                allowed_s = self.allowed_s
                # By a thread in C that needs no interpreter, in case this one gets no turn again.
                faulthandler.dump_traceback_later(allowed_s + 2 * POLL_S, file=log)
                seen, silent_s = (self.beats, 0.0) if self.beats != seen else (seen, silent_s + elapsed_s)
                if silent_s >= allowed_s or is_reported(self.run_dir):
                    self.end(log, silent_s)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def end(self, log: TextIO, silent_s: float) -> None:
        """Leave word of where this rank stands, wait for the others to do the same, and end the process."""
        faulthandler.cancel_dump_traceback_later()
        began = time.monotonic()
        try:
            with suppress(OSError):  # on a full disk there is no place for last words
                self.standing(silent_s).write(self.run_dir)
                log.write(f"rank {self.rank} has made no progress for {silent_s:.0f} s. The stacks of its threads:\n")
                log.flush()
                faulthandler.dump_traceback(log)
                log.flush()
                if self.leave_more is not None:
                    self.leave_more()
                self.leave()
                # The collective that another rank waits in fails with this process, and is to be seen waiting.
                while self.remaining() and time.monotonic() - began < GRACE_S:
                    time.sleep(POLL_S / 5)
                if self.terminal is not None:
                    self.say(self.terminal)
        finally:
            os._exit(EXIT_FAILED)

    def remaining(self) -> list[int]:
        """Ranks that have more to say."""
        return [rank for rank in range(self.world_size) if not ended_path(self.run_dir, rank).exists()]

    def say(self, terminal: TextIO) -> None:
        """The dispatcher's line, by the first rank that has answered."""
        hang = judge(self.run_dir, self.world_size)
        if hang is not None and read_standings(self.run_dir)[0].rank == self.rank:
            failure = Failure(rank=hang.rank, cause=hang.cause)
            print(failure.line(self.run_dir, self.world_size), file=terminal, flush=True)

    def standing(self, silent_s: float) -> Standing:
        frames = list(frames_of(self.main))
        return Standing(
            rank=self.rank,
            time=time.time(),
            silent_s=silent_s,
            beats=self.beats,
            collectives=collectives_issued(),
            waits=any(part in frames[0].f_code.co_filename for part in WAITING),
            waits_in_call=waits_in_call(),
            during=self.during,
            place=place_in(frames),
        )

    # --- the beats --------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        self.beats += 1

    def in_step(self, trainer: pl.Trainer) -> None:
        self.during = f"step {steps_done(trainer) + 1}"
        self.beat()

    def allow(self, seconds: float) -> None:
        """From now on, end the run after so long a silence, and let collectives wait longer; call it after a beat."""
        set_timeouts(seconds + COLLECTIVE_MARGIN_S)
        self.allowed_s = seconds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.beat()
        self.allow(self.startup_timeout_s)  # of mesh axes, too, which torch gives a timeout of its own

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.beat()
        self.allow(self.startup_timeout_s)  # of the groups that DeepSpeed has made since

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.in_step(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.in_step(trainer)
        # Start-up is over when every rank has completed its first step, which may compile. That this rank has completed
        # its own is not enough: it may wait in its second for one that still compiles. Its second is: all ranks have to
        # bring their gradients (StepGuard.agree), so none completes it before all have completed the first.
        # Counted in batches, because a module that optimizes manually may take several optimizer steps in one.
        if self.batches == 2 * trainer.accumulate_grad_batches:
            self.allow(self.timeout_s)
        self.batches += 1

    def on_before_backward(self, *_: Any) -> None:
        self.beat()

    def on_after_backward(self, *_: Any) -> None:
        self.beat()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.beat()

    def on_train_batch_end(self, *_: Any) -> None:
        self.beat()

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.during = f"the checkpoint of step {steps_done(trainer)}"
        self.beat()

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.during = f"validation after step {steps_done(trainer)}"
        self.beat()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.beat()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.beat()

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.in_step(trainer)

    def on_train_end(self, *_: Any) -> None:
        self.during = "the end of training"
        self.beat()

    def on_fit_end(self, *_: Any) -> None:
        self.beat()


def frames_of(thread: int) -> Iterator[FrameType]:
    """A thread's frames, the innermost first."""
    frame: FrameType | None = sys._current_frames()[thread]
    while frame is not None:
        yield frame
        frame = frame.f_back


def place_in(frames: list[FrameType]) -> str:
    """The innermost function that is not a library's."""
    own = [frame for frame in frames if not frame.f_code.co_filename.startswith(LIBRARIES)]
    frame = (own or frames)[0]
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
