"""torchrun's agent for one run: starts the ranks, ends all when one fails, and writes down how each one ended."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import alive
from launch.fork import Forked, become_rank, preload
from launch.job import Job
from launch.lifeline import parented
from launch.signals import leave_to_dispatcher

EXIT_RANK_FAILED = 1


def run_ranks(run_dir: Path, num_ranks: int) -> dict[int, int]:
    """Run the workers to their end; exit codes by rank of those that failed first (empty: all went well)."""
    scratch = run_dir / "ranks" / ".agent"
    scratch.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port of this machine: runs side by side never meet
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch)),
    )
    os.environ.update(parented({}))
    try:
        elastic_launch(config, sys.executable)("-m", "launch.worker", str(run_dir))
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items() if rank not in Rank.killed}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {}


class Rank(SubprocessHandler):
    """A rank as torchrun's agent knows it. It leaves signals to the dispatcher: where it must end, it is killed.

    torchrun's own forks are for functions: of those that fail it names one, it gives the others 30 s to end, and calls
    no excepthook. So to the agent a rank stays a program; it is only born in another way.

    job: of ranks that are forked; None where the agent executes `python -m launch.worker`.
    killed: those that still ran when another failed.
    """

    job: ClassVar[Job | None] = None
    killed: ClassVar[set[int]] = set()

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        leave_to_dispatcher()  # the agent, too, which torchrun has given handlers of its own by now
        job = self.job
        if job is None:
            return subprocess.Popen(args, env=env, start_new_session=True, pass_fds=alive.files())
        return Forked(lambda: become_rank(job, env))

    def close(self, death_sig: signal.Signals | None = None) -> None:
        self.killed.add(self.local_rank_id)
        super().close(signal.SIGKILL)


def main(run_dir: str, num_ranks: str, start: str) -> int:
    """Run the ranks of a run; `start` is how: by `fork`, which CUDA does not survive, or as programs (`exec`)."""
    # The dispatcher says what failed, in one line; the agent's own account would be a second one.
    logging.disable(logging.CRITICAL)
    with suppress(OSError):  # what ps and top call this process; Linux alone takes it so
        Path("/proc/self/comm").write_text("agent")
    leave_to_dispatcher()
    try:
        Rank.job = preload(Path(run_dir)) if start == "fork" else None
        api.get_subprocess_handler = Rank  # type: ignore[assignment]
        failed = run_ranks(Path(run_dir), int(num_ranks))
    except (SignalException, KeyboardInterrupt):  # the dispatcher's; torchrun handles it from its first rank on
        return 128 + signal.SIGINT
    if failed:
        with suppress(OSError):  # on a full disk the exit code alone must do
            (Path(run_dir) / "ranks" / "exit_codes.json").write_text(json.dumps(failed))
    return EXIT_RANK_FAILED if failed else 0
