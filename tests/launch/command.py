"""Runs `python train.py` as a user does: another working directory, a terminal or none, nothing inherited."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

# The smallest run that is still real: a GPT of a few thousand weights on the bundled text.
TINY = [
    "model.net.num_layers=1",
    "model.net.num_heads=2",
    "model.net.num_kv_heads=2",
    "model.net.hidden_size=16",
    "model.net.mlp_size=32",
    "data.sequence_length=32",
    "data.global_batch_size=8",
    "data.micro_batch_size=4",
    "data.max_val_samples=8",
    "trainer.max_steps=4",
    "logger=none",
    "launcher.accelerator=cpu",
]


def user_environment() -> dict[str, str]:
    hidden = ("WANDB_", "TORCHELASTIC", "SLURM")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden) and key not in ranks}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}  # these tests rehearse on the CPU, also where there is a GPU


def train_command(*overrides: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *overrides]


def train(cwd: Path, *overrides: str, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train.py <overrides>` to its end."""
    return subprocess.run(
        train_command(*overrides),
        cwd=cwd,
        env=user_environment() | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start(cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    """`python train.py <overrides>`, left running, its output in files of `cwd`."""
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        return subprocess.Popen(
            train_command(*overrides),
            cwd=cwd,
            env=user_environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


def family(pid: int) -> list[psutil.Process]:
    """A process and everything that descends from it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def rank_process(pid: int, rank: int) -> psutil.Process:
    """The worker of `rank` among the descendants of `pid`."""
    for process in family(pid):
        if process.name().startswith(f"rank {rank} of "):
            return process
    raise AssertionError(f"no worker of rank {rank}")


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
