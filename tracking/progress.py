"""Rank 0's live progress: a bar where there is a terminal, else a plain line per row of metrics."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOBase
from typing import Any, BinaryIO, TextIO, cast, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from models.steps import steps_done
from tracking.meter import Meter

# The bar is drawn by the training thread, at most so often: drawing takes about 2 ms, a thread of its own would
# take the interpreter from training at moments of its choosing.
REDRAW_S = 0.5


@final
class Progress(ProgressBar):
    """Shows the metrics that `meter` computed; put it after the meter. It is silent on every rank but the first.

    terminal: stream of the terminal to draw on, or None for plain lines on stdout.
    log: where what is printed goes besides the terminal, by default where stdout and stderr went before. While the bar
    is up, it also takes the plain lines. Give it when stdout or stderr reach that same terminal themselves.
    """

    def __init__(self, meter: Meter, *, terminal: TextIO | None = None, log: TextIO | None = None) -> None:
        super().__init__()
        self._meter = meter
        self._terminal = terminal
        self._log = log
        self._enabled = True
        self._bar: _Bar | None = None
        self._shown_step = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = self._step = self._shown_step = steps_done(trainer)
        self._started = time.monotonic()
        if self._enabled and self._terminal is not None:
            self._bar = _Bar(self._terminal, self._log, done=self._step, total=trainer.max_steps)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled or steps_done(trainer) == self._step:
            return
        self._step = steps_done(trainer)
        if self._step == self._first_step + 1:
            self._after_first = time.monotonic()
        if self._bar is not None:
            text = f"{self._text('train/loss')}  {self._rate()}  eta {self._eta(trainer)}"
            with self._losing_terminal():
                self._bar.update(self._step, text)
        if self._meter.logged_step > self._shown_step:
            self._shown_step = self._meter.logged_step
            line = f"{self._text('train/loss')}  {self._rate()}  eta {self._eta(trainer)}"
            self._say(trainer, line, draw=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking and "val/loss" in self._meter.latest:
            self._say(trainer, self._text("val/loss"), draw=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _say(self, trainer: pl.Trainer, text: str, *, draw: bool) -> None:
        line = f"step {steps_done(trainer)}/{trainer.max_steps}  {text}\n"
        if self._bar is not None:
            with self._losing_terminal():
                self._bar.say(line, draw=draw)
        else:
            sys.stdout.write(line)
            sys.stdout.flush()

    def _close(self) -> None:
        if self._bar is not None:
            with self._losing_terminal():
                self._bar.close()
            self._bar = None

    @contextmanager
    def _losing_terminal(self) -> Iterator[None]:
        """A terminal that is closed takes the bar with it, not the run."""
        try:
            yield
        except OSError:
            if self._bar is not None:
                sys.stdout, sys.stderr = self._bar.streams
            self._bar = None

    def _text(self, key: str) -> str:
        value = self._meter.latest.get(key)
        return f"{key} {'-' if value is None else f'{value:.4g}'}"

    def _rate(self) -> str:
        value = self._meter.latest.get("perf/tokens_per_s")
        return f"tokens/s {'-' if value is None else f'{value:,.0f}'}"

    def _eta(self, trainer: pl.Trainer) -> str:
        """Time left at the pace so far, validation included; the first step, slow for its own reasons, is left out."""
        steps = self._step - self._first_step - 1
        if steps < 1:
            return "-"
        return duration((time.monotonic() - self._after_first) / steps * (trainer.max_steps - self._step))


def duration(seconds: float) -> str:
    """Clock notation: 0:31, 12:05, 3:00:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@final
class _Bar:
    """The bar on the terminal, and stdout and stderr led above it as long as it is up."""

    def __init__(self, terminal: TextIO, log: TextIO | None, *, done: int, total: int) -> None:
        self._out, self._err = self.streams = sys.stdout, sys.stderr
        # rich would ask stdin, stdout and stderr for the width, and those may all be files here.
        width = os.get_terminal_size(terminal.fileno()).columns or None
        self._console = Console(file=terminal, force_terminal=True, width=width)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"))
        self._progress = RichProgress(
            *columns, console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._task: TaskID = self._progress.add_task("", total=total, completed=done, metrics="")
        self._drawn = 0.0
        self._total = total
        self._above_out = AboveBar(log or self._out, self._console)
        self._above_err = AboveBar(log or self._err, self._console)
        sys.stdout, sys.stderr = cast(TextIO, self._above_out), cast(TextIO, self._above_err)
        self._progress.start()

    def update(self, step: int, metrics: str) -> None:
        self._progress.update(self._task, completed=step, metrics=metrics)
        if step == self._total or time.monotonic() - self._drawn > REDRAW_S:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def say(self, line: str, *, draw: bool) -> None:
        """Write a line to the log, and above the bar if asked to."""
        if draw:
            self._above_out.write(line)
        else:
            self._above_out.log.write(line)
        self._above_out.flush()

    def close(self) -> None:
        sys.stdout, sys.stderr = self._out, self._err
        for stream in (self._above_out, self._above_err):
            stream.finish()
        self._progress.stop()


@final
class AboveBar(TextIOBase):
    """A stream that writes through to `log`, and prints each whole line above the live bar of `console`."""

    def __init__(self, log: TextIO, console: Console) -> None:
        super().__init__()
        self.log = log
        self._console = console
        self._line = ""
        self._process = os.getpid()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.log.encoding

    @property
    def buffer(self) -> BinaryIO:
        """For bytes; they reach the log alone."""
        return self.log.buffer

    def fileno(self) -> int:
        return self.log.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.log.write(text)
        if "\n" in text:
            self.log.flush()
        # A forked data worker has a copy of the bar: two processes must not both draw it.
        if os.getpid() == self._process:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._print(line)
        return len(text)

    def flush(self) -> None:
        self.log.flush()

    def finish(self) -> None:
        """Print what is left of a last line without a line end."""
        if self._line:
            self._print(self._line)
            self._line = ""
        self.flush()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
