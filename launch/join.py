"""Becoming a rank of processes that another launcher (torchrun, srun) has started. Imports torch only then."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from launch import alive
from launch.check import checked
from launch.claim import claim_folder
from launch.compose import compose
from launch.dispatch import EXIT_FAILED, EXIT_REFUSED, load_resolved, prepare, refuse
from launch.job import Job
from launch.lease import BEAT_S, LEASE_S, beating
from launch.schema import AUTO, ConfigError
from launch.signals import last_word, remember_signals
from launch.typed import quoted, read_words
from launch.wording import MISTAKES, one_line
from launch.zygote import end_zygote
from tracking.status import RunStatus, ended, running

STARTED = time.time()
CLAIM_TIMEOUT_S = 60  # ranks start together; a shared file system may take seconds to show a new folder

# SLURM numbers the steps of a job from 0; an interactive shell and the batch script have ids above these.
SLURM_FIRST_SPECIAL_STEP = 0xFFFFFFF0

# Ports for a SLURM step's rendezvous, out of the range from which Linux takes its own (32768 and up).
FIRST_PORT, NUM_PORTS = 12_000, 20_000


@dataclass(frozen=True, kw_only=True)
class OuterLauncher:
    """A launcher that has already decided how many ranks there are, and which of them this process is."""

    name: str
    job_id: str
    restarts: int  # how often it has started this job's processes anew
    rank: int
    world_size: int
    local_world_size: int


def outer_launcher() -> OuterLauncher | None:
    """The launcher this process was started by, read from its variables; None when the user started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return OuterLauncher(
            name="torchrun",
            job_id=os.environ["TORCHELASTIC_RUN_ID"],
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        )
    # A shell inside an allocation has SLURM's job variables too; only srun gives a process a step and a rank in it.
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= SLURM_FIRST_SPECIAL_STEP or "SLURM_PTY_PORT" in os.environ:
        return None
    return OuterLauncher(
        name="slurm",
        job_id=f"{os.environ['SLURM_JOB_ID']}.{step}",
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        rank=int(os.environ["SLURM_PROCID"]),
        world_size=int(os.environ["SLURM_NTASKS"]),
        local_world_size=tasks_of_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"])),
    )


def tasks_of_node(tasks: str, node: int) -> int:
    """Tasks of the node numbered `node` in SLURM's notation: `2(x3),1` is 2 on each of three nodes, then 1."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeat or 1)
    return counts[node]


def export_slurm_ranks(launcher: OuterLauncher) -> None:
    """Say the ranks of SLURM's step in torchrun's variables, which everything below reads."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    job, _, step = launcher.job_id.partition(".")
    os.environ.update(
        RANK=str(launcher.rank),
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=str(launcher.world_size),
        LOCAL_WORLD_SIZE=str(launcher.local_world_size),
        GROUP_RANK=os.environ["SLURM_NODEID"],
        MASTER_ADDR=SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"]),
        MASTER_PORT=str(FIRST_PORT + (31 * int(job) + int(step)) % NUM_PORTS),  # steps of one job side by side differ
    )


def join(launcher: OuterLauncher, overrides: list[str]) -> int:
    """Be this rank of the run that `overrides` describe, to its end; the process's exit code.

    Every rank checks; the first rank alone writes the run folder's files. The folder is named after the launcher's
    job, not the clock, so that all ranks mean the same one.
    """
    if not any(word.startswith("run_dir=") for word in overrides):
        overrides = [*overrides, f"run_dir={quoted(f'runs/{launcher.name}-{launcher.job_id}')}"]
    try:
        if any(word.startswith("-") for word in overrides):
            raise ConfigError(f"Under {launcher.name}, train.py is one rank of one run: it takes overrides, no flags.")
        tree = compose(read_words(overrides, {}))
        if tree.get("hparams") is not None:
            raise ConfigError(f"Under {launcher.name}, train.py is one rank of one run; hparams= searches by several.")
        run_dir, again = Path(str(tree["run_dir"])).resolve(), tree["resume"] == AUTO
        checked({**tree, "run_dir": str(run_dir)}, launcher.world_size, launcher.local_world_size)
        status = running(str(tree["name"]), str(tree["name"]), beat_s=BEAT_S)
        if launcher.rank == 0:
            claim_folder(run_dir, status, again=again, is_over=restarts(run_dir, launcher))
            claim_word(run_dir, launcher).touch()
        else:
            wait_for_claim(run_dir, launcher, CLAIM_TIMEOUT_S + (LEASE_S + alive.WAIT_S if again else 0))
            alive.join(run_dir)
    except MISTAKES as error:
        return refused(error)
    with beating(run_dir, status) if launcher.rank == 0 else nullcontext():
        return run_claimed(launcher, run_dir, {**tree, "run_dir": str(run_dir)}, status)


def run_claimed(launcher: OuterLauncher, run_dir: Path, tree: dict[str, object], status: RunStatus) -> int:
    """Be this rank in a run folder that is this run's."""
    try:
        if launcher.rank == 0:
            job = prepare(tree, launcher.world_size, launcher.local_world_size)
        else:
            job = join_prepared(run_dir, launcher)
    except ConfigError as error:
        if launcher.rank == 0:
            claim_word(run_dir, launcher).unlink()
            refuse(run_dir, status, error)
        return refused(error)
    end_zygote()  # the model is checked
    if launcher.name == "slurm":
        export_slurm_ranks(launcher)
    from launch.worker import run_rank

    if job.unsaved is None:
        remember_signals()
    try:
        number = run_rank(job)
    except BaseException as error:  # the excepthook leaves word in ranks/, and ends the process
        if launcher.rank == 0:
            ended(status, "failed", error=f"{type(error).__name__}: {error}", exit_code=EXIT_FAILED).write(run_dir)
        raise
    if launcher.rank == 0 and number:
        word = last_word(run_dir, number)
        print(word, file=sys.stderr)
        ended(status, "interrupted", error=word, exit_code=128 + number).write(run_dir)
    elif launcher.rank == 0:
        ended(status, "completed").write(run_dir)
    return 128 + number if number else 0


def refused(error: Exception) -> int:
    print(one_line(error), file=sys.stderr)
    return EXIT_REFUSED


def claim_word(run_dir: Path, launcher: OuterLauncher) -> Path:
    """The file by which the first rank tells the others that the run folder is this launch's."""
    return run_dir / "ranks" / f"of-{launcher.name}-{launcher.job_id}-{launcher.restarts}"


def is_fresh(word: Path) -> bool:
    """Whether the first rank of this very launch has written it, and not that of an earlier one by the same id."""
    try:
        return word.stat().st_mtime > STARTED - CLAIM_TIMEOUT_S
    except FileNotFoundError:
        return False


def restarts(run_dir: Path, launcher: OuterLauncher) -> bool:
    """Whether the launcher starts this very job anew in a folder that an earlier attempt of it has claimed."""
    words = (run_dir / "ranks").glob(f"of-{launcher.name}-{launcher.job_id}-*")
    return launcher.restarts > 0 and any(words)


def join_prepared(run_dir: Path, launcher: OuterLauncher) -> Job:
    """The job as the first rank has resolved it: all ranks go on from the same checkpoint."""
    while not (run_dir / "resolved.yaml").exists():
        if not claim_word(run_dir, launcher).exists():
            raise ConfigError("The first rank refused the run; see its own message.")
        time.sleep(0.1)
    if not is_fresh(claim_word(run_dir, launcher)):  # what is there is an earlier attempt's, given back
        raise ConfigError("The first rank refused the run; see its own message.")
    job = Job.of(load_resolved(run_dir))
    try:
        job.data.prepare()  # this machine may have caches of its own
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return job


def wait_for_claim(run_dir: Path, launcher: OuterLauncher, timeout_s: float) -> None:
    """Wait until the first rank has made the run folder its own; without its word, touch nothing and give up."""
    deadline = time.monotonic() + timeout_s
    while not is_fresh(claim_word(run_dir, launcher)):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"The first rank did not claim run_dir={run_dir} in {timeout_s:g} s: it refused, or does not "
                f"share that folder; see its own message."
            )
        time.sleep(0.1)
