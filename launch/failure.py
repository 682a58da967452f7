"""Why a run failed: the rank and the cause that came first, read from what the ranks and the agent left behind."""

import errno
import json
import re
import signal
import sysconfig
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.refused import RefusedError as DataRefusedError
from launch.hang import judge
from launch.output import log_path
from models.refused import RefusedError as ModelRefusedError

REPOSITORY = Path(__file__).resolve().parents[1]
OUR_ROOMS = tuple(REPOSITORY / room for room in ("strategies", "launch", "tracking"))


@dataclass(frozen=True, kw_only=True)
class Failure:
    rank: int | None  # None where it is no single rank's
    cause: str  # one line: an exception with its message, or a signal
    user_error: bool = False  # the message is meant for the user as it stands

    def line(self, run_dir: Path, world_size: int) -> str:
        if self.user_error:
            return self.cause
        if self.rank is None:
            return f"{world_size} ranks {self.cause}; see {run_dir / 'ranks'}"
        return f"rank {self.rank} of {world_size} {self.cause}; see {log_path(run_dir, self.rank)}"


def error_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "ranks" / f"{rank}.error.json"


def record_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """Leave word of the exception that ends this rank; the first word counts, later ones are its echo."""
    path = error_path(run_dir, rank)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    cause = f"raised {described(error)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause = (
            f"could not write {error.filename or 'its files'}: {error.strerror}; free some space, then go on by resume"
        )
    word = {
        "time": time.time(),
        "message": first_words(error),
        "cause": cause,
        "user_error": is_worded(error),
    }
    path.write_text(json.dumps(word))


def first_words(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def described(error: BaseException) -> str:
    """What was raised, what it says, and where: the last line that is not a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_library(frame.filename)]
    where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in (own or frames)[-1:])
    return f"{type(error).__name__}: {first_words(error)}{where}"


def is_library(path: str) -> bool:
    """Whether a file is of Python's or of an installed package, and none that a user would mend."""
    return any(Path(path).is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "purelib")) or "<" in path


def raised_inside(error: BaseException) -> bool:
    """Whether it was raised by what was called, and not by the call, as for arguments that it does not take."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return not any(Path(frame.filename).parts[-3:-1] == ("_internal", "instantiate") for frame in last)


def is_worded(error: BaseException) -> bool:
    """Whether an exception's message is for users as it stands.

    In models/ and datamodules/, where users' own files lie, that is so of a RefusedError alone; what runs them words
    each ValueError that it raises.
    """
    if isinstance(error, ModelRefusedError | DataRefusedError):
        return True
    origin = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[-1:]]
    return isinstance(error, ValueError) and any(path.is_relative_to(room) for path in origin for room in OUR_ROOMS)


def oom_kills() -> int:
    """How many processes the kernel has killed for memory since boot (0 where it does not say)."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def read_word(path: Path) -> Any:
    """What was left in a file, None if there is none or a full disk cut it short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def signal_cause(number: int, oom_kills_before: int) -> str:
    name = signal.Signals(number).name
    if number == signal.SIGKILL and oom_kills() > oom_kills_before:
        return f"was killed by {name}: memory probably ran out; use a smaller data.micro_batch_size or model"
    return f"was killed by {name}"


def last_words(log: Path) -> str:
    """What a C++ exception that nobody caught has said of itself in a rank's log, as C++'s runtime writes it there."""
    try:
        said = re.findall(r"^\s*what\(\):\s*(.*\S)", log.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return ""
    return f": {said[-1]}" if said else ""


def raised(words: Sequence[tuple[Any, int]]) -> Failure | None:
    """The first of the exceptions that ranks have left word of."""
    if not words:
        return None
    word, rank = min(words, key=lambda pair: pair[0]["time"])
    cause = word["message"] if word["user_error"] else word["cause"]
    return Failure(rank=rank, cause=cause, user_error=word["user_error"])


def first_failure(run_dir: Path, world_size: int, oom_kills_before: int) -> Failure | None:
    """The failure that came first: a signal before any exception, then by time.

    A rank that dies by a signal leaves no word, while its peers then complain of a lost connection: so signals lead.
    When ranks have said that the run hangs, that is the cause, unless an exception came before; what signals then end
    is what does not answer.
    """
    paths = run_dir.glob("ranks/*.error.json")
    words = [(word, int(path.name.split(".")[0])) for path in paths if (word := read_word(path)) is not None]
    hang = judge(run_dir, world_size)
    if hang is not None:
        words = [(word, rank) for word, rank in words if word["time"] < hang.time]
        return raised(words) or Failure(rank=hang.rank, cause=hang.cause)
    codes = {int(rank): code for rank, code in (read_word(run_dir / "ranks" / "exit_codes.json") or {}).items()}
    for rank, code in sorted(codes.items()):
        if code < 0:
            said = last_words(log_path(run_dir, rank)) if code == -signal.SIGABRT else ""
            return Failure(rank=rank, cause=signal_cause(-code, oom_kills_before) + said)
    # The agent lists the ranks that fell first; what the others then say is the echo of it.
    words = [(word, rank) for word, rank in words if not codes or rank in codes]
    if first := raised(words):
        return first
    if codes:
        rank, code = min(codes.items())
        return Failure(rank=rank, cause=f"left with exit code {code}")
    return None
