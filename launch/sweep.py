"""Sweeps: what became of each job, in one table and one page at the end, whatever happened on the way."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tracking.certified import RUNS, certificates_below
from tracking.comparison import compare_runs
from tracking.report import print_runs
from tracking.sources import Run, read_runs


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
    if any(run.record is not None for run in runs):
        write_comparison(runs, sweep_dir / "compare.html")
    return sum(run.state != "completed" for run in runs)


def write_comparison(runs: Sequence[Run], path: Path) -> None:
    """Write the page that `scripts/compare.py` writes, and print its path; or why there is none."""
    try:
        # Here, so that a sweep ends as it should without plotly, too.
        from tracking.page import write_page

        write_page(compare_runs(runs, certificates=certificates_below(RUNS)), path)
    except Exception as error:  # noqa: BLE001  # the runs are what counts: a sweep does not fail by its picture
        print(f"{path} was not written: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        print(f"compared in {path}")
