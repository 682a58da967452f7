"""Lightning's logger for the W&B run of rank 0: metrics in rows, the record in the summary, the run's files with it."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.nn import Module

from tracking.record import RunRecord
from tracking.redact import redact
from tracking.wandb_config import AXES, RUN_FILES
from tracking.wandb_run import TROUBLE, finish_run, first_line, save_file, say

# What a run's metric is judged by, where that is not its last value.
SUMMARIES: dict[str, Literal["min", "mean"]] = {"val/loss": "min", "perf/tokens_per_s": "mean"}


@final
class RunLogger(WandbLogger):
    """Lightning's logger with Concord's axes in every row.

    `step` counts optimizer steps, `tokens` those seen so far, `time_s` seconds since this attempt began to train.
    """

    def __init__(self, run: wandb.Run, *, save_dir: Path, tokens_per_step: int | None) -> None:
        super().__init__(experiment=run, save_dir=save_dir, project=run.project, id=run.id, log_model=False)
        self._tokens_per_step = tokens_per_step
        self._began = time.monotonic()
        self._lost = False
        for axis in AXES:
            run.define_metric(axis, hidden=True)  # no charts of their own
        run.define_metric("*", step_metric="step")
        for metric in SUMMARIES:
            run.define_metric(metric, step_metric="step", summary="none")
        self._judged: dict[str, tuple[int, float]] = {}  # how many rows have counted, and to what they have come

    def log_graph(self, model: Module, input_array: Any = None) -> None:
        """No graph; but Lightning asks for it once, when all is set up and training is about to begin."""
        self._began = time.monotonic()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {key: value for key, value in metrics.items() if key != "epoch"}  # a run is one epoch long
        row["time_s"] = round(time.monotonic() - self._began, 3)
        if step is not None:
            row["step"] = step
            if self._tokens_per_step is not None:
                row["tokens"] = step * self._tokens_per_step
        self._send(partial(self.experiment.log, row))
        self._judge(row)

    def _judge(self, row: Mapping[str, float]) -> None:
        """Bring the summary up to date: W&B's own least and mean are no number for good once a row's value was none."""
        for metric in SUMMARIES.keys() & row.keys():
            value, kind = float(row[metric]), SUMMARIES[metric]
            if not math.isfinite(value):
                continue
            count, so_far = self._judged.get(metric, (0, value))
            found = min(so_far, value) if kind == "min" else so_far + (value - so_far) / (count + 1)
            self._judged[metric] = count + 1, found
            self.log_summary({metric: {kind: found}})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Whatever a model saves as its hyperparameters, without the secrets in it."""
        safe = redact(vars(params) if isinstance(params, Namespace) else params)
        self._send(partial(super().log_hyperparams, safe))

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._send(partial(self.experiment.summary.update, values))

    def log_file(self, path: Path) -> None:
        try:
            self._send(partial(save_file, self.experiment, path))
        except OSError as error:  # of the disk
            say(f"{path} is not kept with the run: {error.strerror}.")

    def _send(self, work: Callable[[], None]) -> None:
        """Hand something to W&B's service process; when that is gone, training goes on without it."""
        if self._lost:
            return
        try:
            work()
        except TROUBLE as error:
            self._lost = True
            say(f"its own process is gone ({first_line(error)}); from here on, metrics.csv alone has the metrics.")


def log_record(loggers: Iterable[Logger], record: RunRecord, run_dir: Path) -> None:
    """Write the record's results in the W&B summary, as `record/<field>`, and keep the run's files with it."""
    results = record.results.model_dump(mode="json")
    for logger in _of_wandb(loggers):
        logger.log_summary({f"record/{key}": value for key, value in results.items()})
        for path in filter(Path.is_file, (run_dir / name for name in RUN_FILES)):
            logger.log_file(path)


def finish_wandb(loggers: Iterable[Logger], *, ok: bool) -> None:
    """End the W&B runs among `loggers` as `finish_run` does."""
    for logger in _of_wandb(loggers):
        finish_run(logger.experiment, ok=ok)


def _of_wandb(loggers: Iterable[Logger]) -> list[RunLogger]:
    return [logger for logger in loggers if isinstance(logger, RunLogger)]
