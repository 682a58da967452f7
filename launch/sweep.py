"""Sweeps: what became of each job, in one table at the end, whatever happened on the way."""

from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tracking.report import print_runs
from tracking.sources import read_runs


class SweepTable(Callback):
    """Hydra callback that remembers the sweep's folder, so that the table can be printed however the sweep ends."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepTable.folder = Path(str(config.hydra.sweep.dir)).resolve()


def print_sweep(sweep_dir: Path) -> int:
    """Print what became of each job; the number of jobs that did not complete."""
    try:
        runs = read_runs(sweep_dir)
    except ValueError:  # the sweep ended before its first job began
        return 0
    print_runs(runs)
    return sum(run.state != "completed" for run in runs)
