"""Where an epoch of the samples ends, for a module's hooks and schedules: Lightning runs one endless epoch here.

An optimizer step takes a global batch across the end of an epoch, if need be: the epoch ends with the step that takes
the last of its samples. So it ends at the same step under every strategy, and a run that goes on knows its epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden

from datamodules.order import Stream
from datamodules.own_loading import order_of
from models.steps import steps_done


@final
class Epochs(pl.Callback):
    """Does at the end of each epoch what Lightning does at the end of its one.

    Schedules with `interval="epoch"` are stepped, `on_train_epoch_end` and `on_train_epoch_start` are called,
    `current_epoch` counts, and what was logged with `on_epoch=True` is that epoch's. Put it before what saves
    checkpoints, which hold the schedules' states.

    Raises ValueError where a schedule that looks at a validated metric is to be stepped per epoch: validations go by
    optimizer steps; and where one is to be stepped per epoch of data that only their own code can count.
    """

    order: Stream | None = None  # None where there is no telling when an epoch of the data ends

    def completed(self, step: int) -> int:
        """How many epochs have ended with this optimizer step, or before."""
        return self.order.epochs_ended(step) if self.order else 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.interval == "epoch":
                raise ValueError(
                    f"model: {type(config.scheduler).__name__} looks at {config.monitor} once per epoch, and here "
                    f"runs are validated every trainer.val_every_steps steps; give its lr_scheduler interval='step', "
                    f"frequency=self.trainer.val_check_interval."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        self.order = order_of(trainer)
        if self.order is None:
            check_steps_alone(trainer)
        if steps_done(trainer):  # of a run that goes on
            count(trainer.fit_loop.epoch_progress, self.completed(steps_done(trainer)))
        self.step_schedules, finish_batch = epoch_loop.update_lr_schedulers, epoch_loop.on_advance_end

        def by_step_alone(interval: str, update_plateau_schedulers: bool) -> None:
            if interval == "step":  # Lightning's own epoch ends with the run, in the middle of one
                self.step_schedules(interval, update_plateau_schedulers)

        def finish_batch_and_epochs(data_fetcher: Any) -> None:
            finish_batch(data_fetcher)
            if steps_done(trainer) < trainer.max_steps:  # else Lightning ends the last one
                for _ in range(self.ending(trainer)):
                    end_epoch(trainer)
                    begin_epoch(trainer)

        if is_overridden("on_train_batch_start", pl_module, pl.LightningModule):
            pl_module.on_train_batch_start = going_on(pl_module)  # type: ignore[method-assign]
        epoch_loop.update_lr_schedulers = by_step_alone
        epoch_loop.on_advance_end = finish_batch_and_epochs

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: object) -> None:
        for _ in range(self.ending(trainer)):
            self.step_schedules("epoch", update_plateau_schedulers=False)

    def ending(self, trainer: pl.Trainer) -> int:
        """How many epochs end with the micro-batch that has just been trained on."""
        if trainer.fit_loop._should_accumulate():
            return 0
        progress: Any = trainer.fit_loop.epoch_progress.current
        return self.completed(steps_done(trainer)) - int(progress.processed)


def check_steps_alone(trainer: pl.Trainer) -> None:
    if not trainer.lightning_module.automatic_optimization:
        return  # it steps its schedules by itself
    for config in trainer.lr_scheduler_configs:
        if config.interval == "epoch":
            raise ValueError(
                f"model: {type(config.scheduler).__name__} is stepped per epoch, and of data that can only be iterated "
                f"Concord does not know when one ends; give its lr_scheduler interval='step'."
            )


def going_on(module: pl.LightningModule) -> Callable[..., Any]:
    """The module's `on_train_batch_start`; ValueError where it leaves out the rest of an epoch."""
    start = module.on_train_batch_start

    @wraps(start)
    def begin(*args: Any) -> Any:
        if start(*args) == -1:
            raise ValueError(
                f"model: {type(module).__name__}.on_train_batch_start returns -1, which would end the epoch, and with "
                f"it the order of the samples; end the run by trainer.max_steps, or set trainer.should_stop."
            )

    return begin


def count(progress: Any, completed: int) -> None:
    """Let Lightning's loop believe that it is in the epoch behind so many."""
    for tracker in (progress.total, progress.current):
        tracker.processed = tracker.completed = completed
        tracker.ready = tracker.started = completed + 1


def end_epoch(trainer: pl.Trainer) -> None:
    """As Lightning's `_FitLoop.on_advance_end`, of which the hooks and what they log is wanted here."""
    fit_loop, connector = trainer.fit_loop, trainer._logger_connector
    connector.epoch_end_reached()
    fit_loop.epoch_progress.increment_processed()
    call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=False)
    call._call_lightning_module_hook(trainer, "on_train_epoch_end")
    call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=True)
    connector.on_epoch_end()
    fit_loop.epoch_loop._batches_that_stepped -= 1  # it has been counted already
    connector.update_train_epoch_metrics()
    fit_loop.epoch_loop._batches_that_stepped += 1
    fit_loop.epoch_progress.increment_completed()


def begin_epoch(trainer: pl.Trainer) -> None:
    """As Lightning's `_FitLoop.on_advance_start`."""
    trainer.fit_loop.epoch_progress.increment_ready()
    call._call_callback_hooks(trainer, "on_train_epoch_start")
    call._call_lightning_module_hook(trainer, "on_train_epoch_start")
    trainer.fit_loop.epoch_progress.increment_started()
