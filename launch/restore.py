"""How a run goes on from a checkpoint: its weights, optimizer, schedule, generators, and place in the data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loops.progress import _ReadyCompletedTracker

from datamodules.own_loading import facts_of
from launch.job import Job
from launch.resume import check_seen
from launch.schedule import restore_schedule
from models.steps import steps_done
from strategies.checkpoint import Manifest
from strategies.engines import checkpoint, groups
from strategies.engines.checkpoint import Holds, Reader


class Restore(pl.Callback):
    """Puts a run at the step that lies behind the checkpoint `resume` names."""

    def __init__(self, job: Job) -> None:
        assert job.config.resume is not None
        self.job, self.folder = job, Path(job.config.resume)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = cast(Holds, trainer.strategy)
        self.manifest = Manifest.read(self.folder)
        groups.put_back(engine.stepping, self.manifest.groups)  # and then the schedule what it moves of them
        with Reader(self.folder, self.manifest) as reader:
            engine.restored(checkpoint.load(reader, engine.held(), engine.stepping))
            engine.narrow()
        if self.manifest.loss_scale is not None and engine.scaling is not None:
            engine.scaling = self.manifest.loss_scale
        for scheduler, state in zip(trainer.lr_scheduler_configs, self.manifest.schedulers, strict=True):
            restore_schedule(scheduler.scheduler, state)
        stand_at(trainer, self.manifest.step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_seen(self.manifest, facts_of(trainer), self.job.config)
        self.restore_draws(trainer)  # not earlier: the start of a loader draws a number, too
        every = self.job.config.trainer.val_every_steps
        if every is not None and self.manifest.step % every == 0:
            validate(trainer)  # as the run that wrote the checkpoint did next, or was about to
            # A schedule that looks at what was validated is stepped by Lightning, when its loop restarts behind it.

    def restore_draws(self, trainer: pl.Trainer) -> None:
        if (self.manifest.strategy, self.manifest.mesh) == (self.job.config.strategy["name"], self.job.mesh.sizes):
            with Reader(self.folder, self.manifest) as reader:
                checkpoint.load_draws(reader, trainer.global_rank, trainer.strategy.root_device)
        else:  # there is no telling which numbers a rank of another strategy would draw next
            draw_anew(self.job.config.seed + self.manifest.step)


class Complete(pl.Callback):
    """Finishes a run that goes on behind its last step: all that is left to do is to validate.

    Put it last; `meter` measures what a loop without steps would not tell it of.
    """

    def __init__(self, meter: pl.Callback) -> None:
        self.meter = meter

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if steps_done(trainer) == trainer.max_steps:
            self.meter.on_train_start(trainer, pl_module)
            validate(trainer)
            self.meter.on_train_end(trainer, pl_module)


def draw_anew(seed: int) -> None:
    """Seed all generators, as at the start of a run: alike on all ranks, some of which compute the same thing."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def stand_at(trainer: pl.Trainer, step: int) -> None:
    """Let Lightning's loops believe that they have run `step` optimizer steps of their one epoch."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    micro_batches = step * trainer.accumulate_grad_batches
    optimizer = epoch.automatic_optimization.optim_progress.optimizer
    for progress, count in (
        (epoch.batch_progress, micro_batches),
        (epoch.scheduler_progress, step),
        (optimizer.step, step),
        (optimizer.zero_grad, step),
    ):
        for tracker in (progress.total, progress.current):
            count_all(tracker, count)
    for tracker in (fit.epoch_progress.total, fit.epoch_progress.current):
        tracker.ready = tracker.started = 1  # type: ignore[attr-defined]  # it is a tracker of all four
    epoch._batches_that_stepped = step
    fit.restarting = True


def count_all(tracker: _ReadyCompletedTracker, count: int) -> None:
    for key in vars(tracker):
        setattr(tracker, key, count)


def validate(trainer: pl.Trainer) -> None:
    """Validate now, as Lightning's training loop does between two steps."""
    trainer.validating = True
    first_loop_iter = trainer._logger_connector._first_loop_iter
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_loop_iter
