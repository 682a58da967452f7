"""Ranks by fork, for a run on CPU: each starts from an agent that has imported, once, what every rank needs.

The agent is itself a fork of launch.zygote, and like that one it computes nothing.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from lightning.pytorch.utilities import rank_zero
from torchmetrics.utilities import prints

from launch.dispatch import load_resolved
from launch.job import Job
from launch.lifeline import die_with_parent
from launch.signals import leave_to_dispatcher
from launch.worker import run_rank
from strategies.engines.deepspeed import import_deepspeed
from strategies.grid import Grid
from strategies.zero import Zero

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torchrun's agent, not by its ranks
POLL_S = 0.02


def preload(run_dir: Path) -> Job:
    """The job of a run folder, its engine's imports made; what cannot be imported is a rank's to report."""
    job = Job.of(load_resolved(run_dir))
    with suppress(ImportError):
        import_engine(job)
    gc.freeze()  # ranks share these objects' pages until one writes to them: their collections are to leave them alone
    return job


def import_engine(job: Job) -> None:
    """Import what the ranks of a job will, in the process that they are forked from."""
    if isinstance(job.strategy, Zero) or job.extensions:
        import_deepspeed(on_gpu=False)
    if isinstance(job.strategy, Grid):
        importlib.import_module("strategies.engines.grid")


def become_rank(job: Job, env: Mapping[str, str]) -> None:
    """Be in this forked process what `python -m launch.worker` is in one of its own."""
    os.environ.update(env)
    leave_to_dispatcher()
    die_with_parent()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # OpenMP reads it when it is loaded, and no more
    logging.disable(logging.NOTSET)  # it is the agent that is to say nothing
    # Read from the environment when they were imported.
    rank_zero.rank_zero_only.rank = prints.rank_zero_only.rank = int(env["RANK"])  # type: ignore[attr-defined]
    run_rank(job, dispatched=True)


class Forked:
    """A process that calls a function; the agent knows it by what it uses of subprocess.Popen."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)  # until the child has no handlers of the agent
        self.pid = os.fork()
        if self.pid == 0:
            run_to_end(function, mask)
        os.setpgid(self.pid, self.pid)  # the agent ends a rank by its group, with all that it has started
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def poll(self) -> int | None:
        """Its exit code, or the negated signal that it died of; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_S)
        return code


def run_to_end(function: Callable[[], None], mask: set[int | signal.Signals]) -> NoReturn:
    """Call `function` as the interpreter runs a program, and end the process; the agent's frames are never left."""
    code = 1
    try:
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            function()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if code and error.code is not code:
                print(error.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001  # any: the excepthook decides
            sys.excepthook(*sys.exc_info())
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
