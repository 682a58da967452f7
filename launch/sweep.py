"""Sweeps: what became of each job, in one table and one page at the end, whatever happened on the way."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch.traces import missing
from tracking.certified import RUNS, certificates_below
from tracking.comparison import compare_runs
from tracking.report import print_runs
from tracking.sources import Run, read_runs
from tracking.wandb_config import logger_of


class SweepTable(Callback):
    """Hydra callback that remembers the sweep's folder, so that the table can be printed however the sweep ends.

    made: folders that Hydra is about to make for a run, or a sweep.
    """

    folder: ClassVar[Path | None] = None
    made: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with suppress(OmegaConfBaseException):  # it is told when the run begins
            SweepTable.made = missing(Path(str(config.hydra.run.dir)).resolve())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepTable.folder = Path(str(config.hydra.sweep.dir)).resolve()


def print_sweep(sweep_dir: Path) -> int:
    """Print what became of each job; the number of jobs that did not complete."""
    try:
        runs = read_runs(sweep_dir)
    except ValueError:  # the sweep ended before its first job began
        return 0
    print_runs(runs)
    if any(run.record is not None for run in runs):
        page = sweep_dir / "compare.html"
        # Who has interrupted a sweep does not want to wait for a server.
        if write_comparison(runs, page) and all(run.state != "interrupted" for run in runs):
            log_comparison(runs, page)
    return sum(run.state != "completed" for run in runs)


def write_comparison(runs: Sequence[Run], path: Path) -> bool:
    """Write the page that `scripts/compare.py` writes, and print its path; or why there is none. Whether there is."""
    try:
        # Here, so that a sweep ends as it should without plotly, too.
        from tracking.page import write_page

        write_page(compare_runs(runs, certificates=certificates_below(RUNS)), path)
    except Exception as error:  # noqa: BLE001  # the runs are what counts: a sweep does not fail by its picture
        print(f"{path} was not written: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    print(f"compared in {path}")
    return True


def log_comparison(runs: Sequence[Run], page: Path) -> None:
    """Log the page and the runs' certificates where the runs themselves are logged."""
    config = logger_of(runs)
    if config.mode == "disabled":
        return
    try:
        from tracking import wandb_comparison  # W&B, which a second goes by in

        wandb_comparison.log_comparison(runs, page, config)
    except Exception as error:  # noqa: BLE001  # as above
        print(f"{page} is not in W&B: {type(error).__name__}: {error}", file=sys.stderr)
