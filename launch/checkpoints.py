"""Checkpoints of a run: when they are made, and how it ends when a signal asks for that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from datamodules.own_loading import facts_of, order_of
from launch.groups import LOOKS, Start
from launch.guests import Guests
from launch.job import Job, collective_timeout_s
from launch.resume import trained
from launch.schedule import plain, unkept
from launch.signals import EndedError, asked_by, leave_last_word
from models.steps import steps_done
from strategies.checkpoint import (
    File,
    Manifest,
    Stored,
    best_steps,
    clear,
    folder_of,
    note_val_loss,
    sweep,
    val_losses,
)
from strategies.engines import checkpoint, groups
from strategies.engines.checkpoint import Holds, Named, Writer
from strategies.engines.unkept import beside, unheld, unkept_by
from strategies.engines.vote import Vote


class Checkpoints(pl.Callback):
    """Saves at the steps that the config asks for, and before the run ends on a signal.

    Put it last: a run that ends on a signal ends here.
    """

    def __init__(
        self, job: Job, guests: Guests, start: Start, gets_on: Callable[[], None] = checkpoint.nothing
    ) -> None:
        """`gets_on` is called as often as a save that is waited for has got on."""
        self.job, self.config, self.guests, self.start = job, job.config.checkpoint, guests, start
        self.gets_on = gets_on
        self.votes = job.unsaved is None  # else who asks a run to end has it end at once
        self.saves = self.votes and (self.config.asked or not job.config.evidence)
        self.looks = self.saves  # at what the optimizer keeps, until there is some
        self.saved_step: int | None = None
        # Where this rank's generators stood before the validation under way: it draws numbers, and is done again by a
        # run that goes on from what is saved in it.
        self.draws: list[Named] = []
        self.states: dict[str, Any] | None = None  # what callbacks kept then: they may count validations

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reason = (unsaved(pl_module, trainer) or self.guests.unkept(trainer)) if self.saves else None
        self.refuse(reason, trainer)
        keep = {"keep_last": self.config.keep_last, "keep_best": self.config.keep_best}
        self.writer = Writer(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            asynchronous=self.config.asynchronous,
            after=partial(sweep, self.job.run_dir, **keep),
            gets_on=self.gets_on,
        )
        if trainer.is_global_zero:
            clear(self.job.run_dir, steps_done(trainer))  # of what an earlier attempt has left
        if self.votes:
            # A collective: nobody writes before the folder is clear.
            self.vote = Vote(trainer.world_size, collective_timeout_s(self.job.config))
        self.saved_at = time.monotonic()
        self.saved_since = False  # the ballot whose outcome comes next, which could not know of it
        if self.job.config.resume == str(folder_of(self.job.run_dir, steps_done(trainer))):
            self.saved_step = steps_done(trainer)  # it is this very checkpoint that the run goes on from

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.refuse(unread(trainer) if self.saves else None, trainer)  # not earlier: now there is a loader

    def refuse(self, reason: str | None, trainer: pl.Trainer) -> None:
        """Make no checkpoints if there is a reason, and say so; ValueError if the user relies on them."""
        if reason is not None:
            self.tell_unsaved(reason, trainer)
            self.saves = False

    def tell_unsaved(self, reason: str, trainer: pl.Trainer) -> None:
        if self.config.asked or self.job.config.resume:
            raise ValueError(f"checkpoint: {reason}")
        if trainer.is_global_zero:
            print(f"No checkpoint is made: {reason}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.votes or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the midst of a step
        self.writer.check()
        step, every = steps_done(trainer), self.config.every_steps
        self.draws = list(self.draws_now(trainer)) if self.validates(step) else []
        self.states = self.guests.states(trainer) if self.saves and self.validates(step) else None
        reason = self.look(trainer) if self.looks and self.saves else None
        signal, minutes_due = self.vote_on(trainer, self.minutes_are_over(trainer), is_unsaved=reason is not None)
        minutes_due, self.saved_since = minutes_due and not self.saved_since, False
        is_last = step == trainer.max_steps and bool(self.config.at_end)  # "auto" asks for it, too
        if self.saves and (is_last or minutes_due or (every is not None and step % every == 0)):
            self.save(trainer)
        if signal:
            self.end(trainer, signal)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.votes:
            return
        signal, _ = self.vote_on(trainer)  # every rank has as many batches
        if signal:
            self.end(trainer, signal)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.saves or not self.config.keep_best:
            return
        step, loss = steps_done(trainer), float(trainer.callback_metrics.get("val/loss", math.nan))
        if math.isfinite(loss) and trainer.is_global_zero:
            note_val_loss(self.job.run_dir, step, loss)
        best = best_steps(val_losses(self.job.run_dir), self.config.keep_best) if trainer.is_global_zero else []
        if trainer.strategy.broadcast(step in best):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.saves and self.config.at_end and trainer.should_stop:  # before trainer.max_steps, unless saved already
            self.save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer.wait()
        if self.votes:
            self.vote.outcome()  # of the last ballot: no collective is left under way

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "writer"):  # else the fit has not begun
            self.writer.settle()

    def vote_on(self, trainer: pl.Trainer, minutes_due: bool = False, *, is_unsaved: bool = False) -> tuple[int, int]:
        """The signal that any rank was sent, and whether it is time to save; none saves what one of them cannot."""
        signal, minutes, unsaved = self.vote.cast(self.asked(trainer), int(minutes_due), int(is_unsaved))
        self.saves = self.saves and not unsaved
        return signal, minutes

    def look(self, trainer: pl.Trainer) -> str | None:
        """What of the optimizer, behind the first step that it has taken, could not be saved; None if there is none."""
        engine = cast(Holds, trainer.strategy)
        self.looks = not engine.stepping.state and steps_done(trainer) < self.start.step + LOOKS
        reason = unkept_by(engine) or self.start.unkept(engine.stepping)
        if reason is not None:
            self.looks = False
            self.tell_unsaved(f"{reason}; choose another optimizer, or set checkpoint.at_end=false.", trainer)
        return reason

    def asked(self, trainer: pl.Trainer) -> int:
        return asked_by(self.job.run_dir, is_first=trainer.is_global_zero)

    def minutes_are_over(self, trainer: pl.Trainer) -> bool:
        """By the clock of the first rank."""
        every = self.config.every_minutes
        due = every is not None and time.monotonic() - self.saved_at >= 60 * every
        return trainer.is_global_zero and due and self.writer.is_over

    def save(self, trainer: pl.Trainer) -> None:
        """Save the step that lies behind, unless it is saved already."""
        if self.saved_step == steps_done(trainer):
            return
        self.saved_step, self.saved_since = steps_done(trainer), True
        for callback in cast(Any, trainer).callbacks:
            callback.on_save_checkpoint(trainer, trainer.lightning_module, {})  # the meter leaves this step out
        folder = folder_of(self.job.run_dir, steps_done(trainer))
        self.writer.save(folder, self.named(trainer), partial(filled, self.manifest(trainer)))
        self.saved_at = time.monotonic()

    def end(self, trainer: pl.Trainer, signal: int) -> None:
        """End the run, on all ranks at once, with its last whole step saved if it can be."""
        if self.saves:
            self.save(trainer)
        self.writer.wait()
        self.vote.outcome()
        if trainer.is_global_zero:
            leave_last_word(self.job.run_dir, step=steps_done(trainer), saved=self.saves)
        raise EndedError(signal)

    def named(self, trainer: pl.Trainer) -> Iterator[Named]:
        engine = cast(Holds, trainer.strategy)
        for held in engine.held():
            if held.writes:
                yield from checkpoint.tensors_of(held, engine.stepping)
        yield from self.draws or self.draws_now(trainer)

    def draws_now(self, trainer: pl.Trainer) -> Iterator[Named]:
        return checkpoint.draws(trainer.global_rank, trainer.strategy.root_device)

    def validates(self, step: int) -> bool:
        """Whether validation follows this step."""
        config = self.job.config.trainer
        return step == config.max_steps or (config.val_every_steps is not None and step % config.val_every_steps == 0)

    def manifest(self, trainer: pl.Trainer) -> Manifest:
        """All that is to be said of a checkpoint but what lies in which file."""
        config = self.job.config
        return Manifest(
            step=steps_done(trainer),
            strategy=config.strategy["name"],
            mesh=cast(dict[str, int], self.job.mesh.sizes),
            trained=trained(config) | facts_of(trainer),
            schedulers=[plain(scheduler.scheduler) for scheduler in trainer.lr_scheduler_configs],
            groups=groups.moved(cast(Holds, trainer.strategy).stepping, self.start.settings),
            loss_scale=cast(Holds, trainer.strategy).scaling,
            callbacks=self.guests.states(trainer) if self.states is None else self.states,
            files={},
            tensors={},
        )


def unread(trainer: pl.Trainer) -> str | None:
    """Why no run could go on in the midst of its data; None where it can."""
    data = cast(Any, trainer).datamodule
    if data is not None and is_overridden("state_dict", data):
        return f"{type(data).__name__}.state_dict is not kept; let what it says follow from the optimizer step."
    if order_of(trainer) is None:
        return (
            "data that can only be iterated cannot be read from the middle on; give the training loader a data set "
            "with __getitem__, or ask for no checkpoint."
        )
    return None


def filled(manifest: Manifest, files: dict[str, File], tensors: dict[str, Stored]) -> Manifest:
    return manifest.model_copy(update={"files": files, "tensors": tensors})


def unsaved(module: pl.LightningModule, trainer: pl.Trainer) -> str | None:
    """What of a module's state a checkpoint would leave out without a word; None where there is nothing."""
    kind = type(module).__name__
    for hook in ("on_save_checkpoint", "on_load_checkpoint"):
        if is_overridden(hook, module, pl.LightningModule):
            return (
                f"{kind}.{hook} is not called, since no rank has the whole state; keep what it saves in a persistent "
                f"buffer."
            )
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        return f"{kind} has {len(trainer.optimizers)} optimizers, or optimizes manually."
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            return (
                f"{type(part).__name__}.get_extra_state of {name or kind} is not called, since no rank has the whole "
                f"state; keep what it saves in a persistent buffer."
            )
    schedules = (unkept(config, trainer) for config in trainer.lr_scheduler_configs)
    return next(filter(None, (unheld(module), beside(cast(Holds, trainer.strategy).stepping), *schedules)), None)
