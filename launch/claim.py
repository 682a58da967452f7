"""Who may use a run folder: one run at a time. One that goes on there moves its earlier attempt's files aside."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from launch import alive
from launch.attempts import earlier_status, give_attempt_back, pending, set_attempt_aside
from launch.lease import is_gone
from launch.schema import ConfigError
from tracking.status import RunStatus


def claim_folder(run_dir: Path, status: RunStatus, *, again: bool = False, is_over: bool = False) -> None:
    """Make the run folder this run's, and say so in its status.json.

    ConfigError if it cannot be written, or holds another run; with `again`, only if that one still runs, for which one
    of another host is watched. `is_over`: whether an earlier attempt there is known to have ended, whatever its status
    says.
    """
    with claiming(run_dir):
        other = earlier_status(run_dir)
        is_over = is_over or other is None or other.state != "running" or (again and is_gone(run_dir, other))
        if again and is_over:  # what was killed may still be dying, and write
            alive.take(run_dir, is_elsewhere=is_elsewhere(other))
        if is_over and pending(run_dir).exists():
            give_attempt_back(run_dir)
            other = earlier_status(run_dir)
        if (run_dir / "ranks").exists() and not (again and is_over):
            raise taken(run_dir, other, again=again)
        if again:
            set_attempt_aside(run_dir)
        else:
            alive.take(run_dir)
        (run_dir / "ranks").mkdir()
        status.write(run_dir)


def is_elsewhere(status: RunStatus | None) -> bool:
    """Whether a run was another host's."""
    return status is not None and status.dispatcher is not None and status.dispatcher[0] != socket.gethostname()


def recover_folder(run_dir: Path) -> None:
    """Undo what an attempt has done to the folder that was killed before it began."""
    if pending(run_dir).exists():
        with claiming(run_dir):
            other = earlier_status(run_dir)
            if pending(run_dir).exists() and (other is None or other.state != "running"):
                give_attempt_back(run_dir)


@contextmanager
def claiming(run_dir: Path) -> Iterator[None]:
    """For a moment, be the only process that decides whose the run folder is; ConfigError if another one is at it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(run_dir / ".claim", timeout=0):  # the system gives it back also when its holder is killed
            yield
    except Timeout:
        raise ConfigError(f"run_dir={run_dir} is just being taken by another run; choose another run_dir.") from None
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another run_dir.") from None


def taken(run_dir: Path, other: RunStatus | None, *, again: bool) -> ConfigError:
    state = other.state if other else "without a status"
    if again and other is not None and other.dispatcher is not None:
        host, pid, _ = other.dispatcher
        fix = "wait for its end"
        if other.beat_s is None:  # it may be gone, and cannot be watched
            fix += f", or, if that machine is gone, remove {run_dir / 'status.json'}"
        return ConfigError(f"resume=auto: the run in run_dir={run_dir} still runs (process {pid} on {host}); {fix}.")
    return ConfigError(
        f"run_dir={run_dir} already holds another run ({state}); choose another run_dir, or go on with that one by "
        f"resume=auto."
    )
