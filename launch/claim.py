"""Who may use a run folder: one run at a time. One that goes on there moves its earlier attempt's files aside."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from launch.schema import ConfigError
from tracking.status import RunStatus, read_status

# Of an earlier attempt, what the next one goes on with, or does not touch.
KEPT = ("attempts", "checkpoints", "wandb", ".claim")


def claim_folder(run_dir: Path, status: RunStatus, *, again: bool = False, is_over: bool = False) -> None:
    """Make the run folder this run's, and say so in its status.json.

    ConfigError if it cannot be written, or holds another run; with `again`, only if that one still runs. `is_over`:
    whether an earlier attempt there is known to have ended, whatever its status says.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(run_dir / ".claim", timeout=0):  # the system gives it back also when its holder is killed
            other = read_status(run_dir)
            if (run_dir / "ranks").exists() and not (again and (is_over or other is None or other.state != "running")):
                raise taken(run_dir, other, again=again)
            if again:
                set_attempt_aside(run_dir)
            (run_dir / "ranks").mkdir()
            status.write(run_dir)
    except Timeout:
        raise ConfigError(f"run_dir={run_dir} is just being taken by another run; choose another run_dir.") from None
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another run_dir.") from None


def taken(run_dir: Path, other: RunStatus | None, *, again: bool) -> ConfigError:
    state = other.state if other else "without a status"
    if again and other is not None and other.dispatcher is not None:
        host, pid, _ = other.dispatcher
        return ConfigError(
            f"resume=auto: the run in run_dir={run_dir} still runs (process {pid} on {host}); wait for its end, or, if "
            f"that machine is gone, remove {run_dir / 'status.json'}."
        )
    return ConfigError(
        f"run_dir={run_dir} already holds another run ({state}); choose another run_dir, or go on with that one by "
        f"resume=auto."
    )


def set_attempt_aside(run_dir: Path) -> None:
    """Move all that an earlier attempt has left, but its checkpoints, into attempts/<n>; nothing is deleted."""
    left = [path for path in run_dir.iterdir() if path.name not in KEPT]
    if not left:
        return
    attempts = run_dir / "attempts"
    attempts.mkdir(exist_ok=True)
    attempt = attempts / str(1 + max((int(path.name) for path in attempts.iterdir()), default=0))
    attempt.mkdir()
    for path in left:
        path.rename(attempt / path.name)
