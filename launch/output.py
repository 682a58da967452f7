"""Where a rank's output goes: all of it into its log file, and rank 0's also to the terminal."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from launch import alive
from launch.signals import ENDING


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "ranks" / f"{rank}.log"


def own_output(run_dir: Path, rank: int) -> TextIO | None:
    """Send this process's stdout and stderr, native code's too, to ranks/<rank>.log; rank 0's to the terminal as well.

    Returns the terminal for rank 0's live progress bar, where stdout is one, else None.
    """
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(1) if rank == 0 and os.isatty(1) else None
    sink = tee(path) if rank == 0 else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # both are TextIOWrapper here
    return None if terminal is None else os.fdopen(terminal, "w")


def tee(path: Path) -> int:
    """File descriptor whose bytes reach both `path` and the present stdout.

    A process of its own, so that the last words of a rank that dies by a signal arrive; it ends at end of file,
    and signals for the run's process group do not reach it, nor do those that ask all of a run's processes to end.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}  # what is ignored stays so in it
    process = subprocess.Popen(
        ["tee", "--append", str(path)], stdin=subprocess.PIPE, start_new_session=True, pass_fds=alive.files()
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert process.stdin is not None
    sink = os.dup(process.stdin.fileno())
    process.stdin.close()
    return sink
