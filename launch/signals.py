"""Signals that ask a run to end: it saves its next step, ends in order, and says how to go on."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path
from types import FrameType

from launch.traces import in_sweep
from launch.typed import quoted
from strategies.checkpoint import checkpoints

# What schedulers send before they take a machine away, and a terminal that is closed.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class TerminatedError(KeyboardInterrupt):
    """A signal asked this process to end; it ends as on Ctrl-C, with the ranks ended and the status written."""

    def __init__(self, number: int, message: str | None = None) -> None:
        super().__init__(message or f"ended by {signal.Signals(number).name}")
        self.number, self.exit_code = number, 128 + number


class EndedError(Exception):
    """Raised on every rank of a run that has ended because a signal asked it to, after what it had done was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def end_on_signals() -> None:
    """Let the signals raise TerminatedError; their default would leave a run's ranks to be killed."""

    def end(number: int, frame: object) -> None:
        raise TerminatedError(number)

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, end)


class Received:
    """The signal that asks this process to end; 0 where there is none."""

    number = 0


def asked_by(run_dir: Path, *, is_first: bool) -> int:
    """The signal that asks the run to end, as far as this rank knows: the first hears of the dispatcher's; or 0."""
    word = asked_path(run_dir)
    if is_first and not Received.number and word.exists():
        Received.number = int(json.loads(word.read_text()))
    return Received.number


def remember_signals() -> None:
    """Let the signals be answered at the end of a step, by a rank that has no dispatcher."""

    def remember(number: int, frame: FrameType | None) -> None:
        Received.number = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, remember)


def leave_to_dispatcher() -> None:
    """Do nothing on the signals, in a process of a run that has a dispatcher: it is the one that answers them.

    Who ends a job may send them to all its processes (systemd, SLURM at a time limit, a container's init). They are not
    ignored but handled by a function that does nothing, so that programs started from here know them again.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def ask_to_end(run_dir: Path, number: int) -> None:
    """Tell the ranks of a run, from its dispatcher, that it is to end."""
    aside = asked_path(run_dir).with_suffix(".aside")
    aside.write_text(json.dumps(number))
    aside.rename(asked_path(run_dir))


def asked_path(run_dir: Path) -> Path:
    return run_dir / "ranks" / "end.json"


def ended_path(run_dir: Path) -> Path:
    return run_dir / "ranks" / "ended.json"


def leave_last_word(run_dir: Path, *, step: int, saved: bool) -> None:
    """Have the first rank of a run that ends on a signal say behind which step."""
    ended_path(run_dir).write_text(json.dumps({"step": step, "saved": saved}))


def last_word(run_dir: Path, number: int) -> str:
    """What there is to say of a run that a signal has ended."""
    word = json.loads(ended_path(run_dir).read_text())
    ended = f"ended by {signal.Signals(number).name} after optimizer step {word['step']}"
    if not word["saved"]:
        return f"{ended}, of which nothing is saved"
    return f"{ended}, which is saved; go on by the same command with {typed(run_dir)} resume=auto"


def way_on(run_dir: Path) -> str:
    """How to go on from what a run has saved, that had no time to save more; nothing if there is nothing saved."""
    saved = checkpoints(run_dir)
    if not saved:
        return ""
    step = int(saved[-1].name.removeprefix("step-"))
    if in_sweep(run_dir):
        return f"; optimizer step {step} is saved: go on by python train.py {typed(run_dir.parent, 'resume_sweep')}"
    return f"; optimizer step {step} is saved: go on by the same command with {typed(run_dir)} resume=auto"


def typed(run_dir: Path, key: str = "run_dir") -> str:
    """The override for a run folder as a shell takes it."""
    word = str(run_dir)
    return f"{key}={word}" if re.fullmatch(r"[\w./-]+", word) else shlex.quote(f"{key}={quoted(word)}")
