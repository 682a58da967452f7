"""Whether a run of another host still lives, where its process cannot be seen.

Who runs it touches its status.json again and again. Who wants its folder watches whether that file's time changes: the
time is compared with itself alone, as clocks of two machines may differ.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from tracking.status import RunStatus, read_status

BEAT_S = 10
BEATS_MISSED = 6  # a machine that swaps, or a file server that fails over, may leave out some
LEASE_S = BEATS_MISSED * BEAT_S


@contextmanager
def beating(run_dir: Path, status: RunStatus) -> Iterator[None]:
    """Show other hosts that the run in a folder lives, as long as the block lasts."""
    over = Event()
    # Nobody waits for its end: a file server that is gone would hold up the run's.
    Thread(target=beat, args=(run_dir, status, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def beat(run_dir: Path, status: RunStatus, over: Event) -> None:
    while not over.wait(status.beat_s):
        with suppress(OSError, ValueError):
            now = read_status(run_dir)
            # Its own end may just have given the folder back to the attempt before.
            if now is not None and now.dispatcher != status.dispatcher and not over.wait(1):
                end_at_once(run_dir)
            os.utime(run_dir / "status.json")


def end_at_once(run_dir: Path) -> None:
    """End a run that was thought to be gone, as when its machine stood still: its folder is another one's by now."""
    print(f"run_dir={run_dir} was taken over by another process; this one ends.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # nothing more is written there; ranks end with the process that runs them


def is_gone(run_dir: Path, status: RunStatus) -> bool:
    """Whether nothing is heard any more of a run that another host's status.json says is running; takes a minute.

    Of one that does not touch its status, there is no telling: it is believed.
    """
    if status.dispatcher is None or status.beat_s is None or status.dispatcher[0] == socket.gethostname():
        return False
    wait_s = BEATS_MISSED * status.beat_s
    who = f"process {status.dispatcher[1]} on {status.dispatcher[0]}"
    print(f"resume=auto: waiting {wait_s:g} s for a sign of life of {who}, which ran {run_dir}.", file=sys.stderr)
    path = run_dir / "status.json"
    first, deadline = touched(path), time.monotonic() + wait_s
    while time.monotonic() < deadline:
        time.sleep(status.beat_s / 10)
        if touched(path) != first:
            return False
    print(f"resume=auto: {who} has given none; taking over.", file=sys.stderr)
    return True


def touched(path: Path) -> tuple[int, int]:
    """The file, and when it was changed, as its server has it: NFS asks for that whenever a file is opened."""
    with path.open() as file:
        stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_mtime_ns
