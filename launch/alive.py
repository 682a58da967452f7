"""Whether a process of an attempt at a run still lives: all of them hold a lock on a file of its folder.

What flock(2) locks is an open file, which processes inherit, and the kernel lets go of when the last of them is dead,
whatever they died of. So who gets the lock alone knows that nobody else can write into the folder any more.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.schema import ConfigError

LOCK = ".alive"
POLL_S = 0.02
QUIET_S = 2  # the lifelines of a dispatcher, its zygote, its agent and its ranks need this long, one after the other
WAIT_S = 60

_held: dict[Path, int] = {}  # open files of this process, by run folder
_inherited: list[int] = []


def take(run_dir: Path, *, is_elsewhere: bool = False) -> None:
    """Wait until no process of an earlier attempt lives, and hold the folder for this one.

    ConfigError if one does not end. is_elsewhere: whether the earlier attempt was on another host, which may be gone
    without its file server's knowledge: then it is not waited for longer.
    """
    give_up(run_dir)
    path = run_dir / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not wait_for_all(file, path):
            if not is_elsewhere:
                raise still_alive(path)
            path.unlink()
            os.close(file)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)  # ranks that others start come to hold it, too
    except BaseException:
        os.close(file)
        raise
    _held[run_dir] = file


def join(run_dir: Path) -> None:
    """Hold the folder of an attempt that another process has taken it for."""
    file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    _held[run_dir] = file


def inherit(kept: Sequence[int]) -> None:
    """Hold folders by what another process has sent."""
    _inherited[:] = kept


def give_up(run_dir: Path) -> None:
    """Hold the folder no longer; those that have inherited the lock still do."""
    file = _held.pop(run_dir, None)
    if file is not None:
        os.close(file)


def files() -> list[int]:
    """What a program has to be given, which inherits nothing by itself, to be one of the attempt's processes."""
    return [*_held.values(), *_inherited]


def wait_for_all(file: int, path: Path) -> bool:
    """Whether the lock was got in time; also where the file system has none, and nothing can be told."""
    start, has_spoken = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - start
        except OSError:
            return True
        else:
            return True
        if waited > WAIT_S:
            return False
        if waited > QUIET_S and not has_spoken:
            has_spoken = True
            told = f"{path.parent}: waiting for the end of {named(path)} of an earlier attempt."
            print(told, file=sys.stderr)
        time.sleep(POLL_S)


def still_alive(path: Path) -> ConfigError:
    return ConfigError(
        f"run_dir={path.parent}: {named(path)} of an earlier attempt did not end in {WAIT_S} s; end it, then try again."
    )


def named(path: Path) -> str:
    """The processes of this host that have a file open, by their numbers."""
    wanted = path.stat()
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with suppress(OSError):  # another user's, or gone by now
            for file in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(file.stat(), wanted):
                        found.append(process.name)
                        break
    return f"process {', '.join(sorted(found, key=int))}" if found else "a process"
