"""Becoming a rank of processes that another launcher (torchrun, srun) has started. Imports torch only then."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException

from launch.compose import compose
from launch.dispatch import EXIT_REFUSED, claim_folder, prepare, refuse, status_of
from launch.entry import one_line
from launch.schema import ConfigError
from tracking.status import ended

CLAIM_TIMEOUT_S = 60  # ranks start together; a shared file system may take seconds to show a new folder


@dataclass(frozen=True, kw_only=True)
class OuterLauncher:
    """A launcher that has already decided how many ranks there are, and which of them this process is."""

    name: str
    job_id: str
    rank: int
    world_size: int


def outer_launcher() -> OuterLauncher | None:
    """The launcher this process was started by, read from its variables; None when the user started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return OuterLauncher(
            name="torchrun",
            job_id=os.environ["TORCHELASTIC_RUN_ID"],
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    # A shell inside an allocation has SLURM's job variables too; only srun gives a process a step and a rank in it.
    if os.environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in os.environ:
        return OuterLauncher(
            name="slurm",
            job_id=f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}",
            rank=int(os.environ["SLURM_PROCID"]),
            world_size=int(os.environ["SLURM_NTASKS"]),
        )
    return None


def export_slurm_ranks() -> None:
    """Say SLURM's ranks in torchrun's variables, which everything below reads."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=str(-(-int(os.environ["SLURM_NTASKS"]) // int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))),
        GROUP_RANK=os.environ.get("SLURM_NODEID", "0"),
        MASTER_ADDR=slurm.main_address,
        MASTER_PORT=str(slurm.main_port),
    )


def join(launcher: OuterLauncher, overrides: list[str]) -> int:
    """Be this rank of the run that `overrides` describe, to its end; the process's exit code.

    Every rank checks; the first rank alone writes the run folder's files. The folder is named after the launcher's
    job, not the clock, so that all ranks mean the same one.
    """
    if launcher.name == "slurm":
        export_slurm_ranks()
    if not any(word.startswith("run_dir=") for word in overrides):
        overrides = [*overrides, f"run_dir='runs/{launcher.name}-{launcher.job_id}'"]
    try:
        tree = compose(overrides)
    except (ConfigError, HydraException) as error:
        return refused(error)
    run_dir = Path(str(tree["run_dir"])).resolve()
    status = status_of(tree)
    try:
        if launcher.rank == 0:
            claim_folder(run_dir)
        else:
            wait_for_claim(run_dir)
    except ConfigError as error:
        return refused(error)
    try:
        job = prepare({**tree, "run_dir": str(run_dir)}, launcher.world_size, write=launcher.rank == 0)
    except ConfigError as error:
        if launcher.rank == 0:
            refuse(run_dir, status, error)
        return refused(error)
    from launch.worker import run_rank

    if launcher.rank == 0:
        status.write(run_dir)
    run_rank(job)  # a failure ends the process there, after leaving word in ranks/
    if launcher.rank == 0:
        ended(status, "completed").write(run_dir)
    return 0


def refused(error: Exception) -> int:
    print(one_line(error), file=sys.stderr)
    return EXIT_REFUSED


def wait_for_claim(run_dir: Path) -> None:
    """Wait until the first rank has made the run folder its own; it says so by `ranks/`, which it alone makes."""
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while not (run_dir / "ranks").is_dir():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir={run_dir} did not appear in {CLAIM_TIMEOUT_S} s; give one that all ranks share."
            )
        time.sleep(0.1)
