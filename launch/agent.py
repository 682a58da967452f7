"""torchrun's agent for one run: starts the ranks, ends all when one fails, and writes down how each one ended.

Run by the dispatcher as `python -m launch.agent <run folder> <number of ranks> fork|exec`; the last is how ranks start.
"""

import os
import sys

from launch.lifeline import die_with_parent, parented

die_with_parent()  # before the seconds that importing torch takes

FORKS = sys.argv[3] == "fork"
if FORKS:
    import launch.worker  # noqa: F401  # before torch is here: a run's time counts from its first lines

import json
import logging
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

EXIT_RANK_FAILED = 1

# The dispatcher says what failed, in one line; the agent's own account would be a second one.
logging.disable(logging.CRITICAL)


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
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {}


def start_by_fork(run_dir: Path) -> None:
    """Let the agent fork each rank of this run where it would execute `python -m launch.worker`.

    torchrun's own forks are for functions: of those that fail it names one, it gives the others 30 s to end, and calls
    no excepthook. So to the agent a rank stays a program; it is only born in another way.
    """
    from launch.fork import Forked, become_rank, preload

    job = preload(run_dir)

    class ForkedRank(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return Forked(lambda: become_rank(job, env))

    api.get_subprocess_handler = ForkedRank  # type: ignore[assignment]


def main() -> int:
    run_dir, num_ranks = Path(sys.argv[1]), int(sys.argv[2])
    if FORKS:
        start_by_fork(run_dir)
    try:
        failed = run_ranks(run_dir, num_ranks)
    except SignalException as error:
        return 128 + error.sigval
    if failed:
        with suppress(OSError):  # on a full disk the exit code alone must do
            (run_dir / "ranks" / "exit_codes.json").write_text(json.dumps(failed))
    return EXIT_RANK_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
