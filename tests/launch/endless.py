"""A run without end, and the processes of it."""

from pathlib import Path

import psutil

from tests.launch.command import TINY, alive, family, wait_for
from tests.launch.warm import Command, start

ENDLESS = ["strategy=ddp", *TINY, "trainer.max_steps=1000000", "trainer.val_every_steps=null", "run_dir=run"]


def training(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.csv"
    return metrics.exists() and len(metrics.read_text().splitlines()) > 2


def start_training(folder: Path, *words: str) -> tuple[Command, list[psutil.Process]]:
    """A run that has taken its first steps, and all its processes."""
    process = start(folder, *ENDLESS, *words)
    wait_for(lambda: training(folder / "run") or process.poll() is not None, "the first steps")
    assert process.poll() is None, (folder / "err").read_text()
    return process, family(process.pid)


def assert_all_end(processes: list[psutil.Process], within_s: float = 30) -> None:
    wait_for(lambda: not alive(processes), f"the end of {alive(processes)}", timeout_s=within_s)
