"""Checkpoints of a run: when they are made, and how a run goes on from one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loops.progress import _ReadyCompletedTracker
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from launch.job import Job
from launch.resume import trained
from strategies.checkpoint import File, Manifest, Stored, folder_of, sweep
from strategies.engines import checkpoint
from strategies.engines.checkpoint import Held, Named, Reader


class Holds(Protocol):
    """What an engine must show for its run to be saved and resumed."""

    @property
    def stepping(self) -> Optimizer:
        """The optimizer that steps this rank's tensors, and keeps state for them."""
        ...

    def held(self) -> Iterator[Held]:
        """This rank's part of every parameter and persistent buffer."""
        ...

    def narrow(self) -> None:
        """Make computing copies of what has been loaded into the stepped weights."""
        ...


class Checkpoints(pl.Callback):
    """Saves at the steps that the config asks for, and puts a run at the step that `resume` names."""

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config.checkpoint

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.config.saves or self.job.config.resume is not None:
            check_module(pl_module, trainer)
        if self.job.config.resume is not None:
            self.restore(trainer, Path(self.job.config.resume))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.job.config.resume is not None:  # not earlier: the start of a loader draws a number, too
            self.restore_draws(trainer, Path(self.job.config.resume))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.config.every_steps
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the midst of a step
        if (step == trainer.max_steps and self.config.at_end) or (every is not None and step % every == 0):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        engine = cast(Holds, trainer.strategy)
        for callback in cast(Any, trainer).callbacks:
            callback.on_save_checkpoint(trainer, trainer.lightning_module, {})  # the meter leaves this step out
        checkpoint.save(
            folder_of(self.job.run_dir, trainer.global_step),
            self.named(trainer, engine),
            lambda files, tensors: self.manifest(trainer, files, tensors),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
        )
        if trainer.is_global_zero:
            sweep(self.job.run_dir, self.config.keep_last)

    def named(self, trainer: pl.Trainer, engine: Holds) -> Iterator[Named]:
        for held in engine.held():
            if held.writes:
                yield from checkpoint.tensors_of(held, engine.stepping)
        yield from checkpoint.draws(trainer.global_rank, trainer.strategy.root_device)

    def manifest(self, trainer: pl.Trainer, files: dict[str, File], tensors: dict[str, Stored]) -> Manifest:
        config = self.job.config
        return Manifest(
            step=trainer.global_step,
            strategy=config.strategy["name"],
            mesh=cast(dict[str, int], self.job.mesh.sizes),
            trained=trained(config),
            schedulers=[plain(scheduler.scheduler) for scheduler in trainer.lr_scheduler_configs],
            files=files,
            tensors=tensors,
        )

    def restore(self, trainer: pl.Trainer, folder: Path) -> None:
        engine, manifest = cast(Holds, trainer.strategy), Manifest.read(folder)
        with Reader(folder, manifest) as reader:
            checkpoint.load(reader, engine.held(), engine.stepping)
            engine.narrow()
        for scheduler, state in zip(trainer.lr_scheduler_configs, manifest.schedulers, strict=True):
            restore_schedule(scheduler.scheduler, state)
        stand_at(trainer, manifest.step)

    def restore_draws(self, trainer: pl.Trainer, folder: Path) -> None:
        manifest = Manifest.read(folder)
        if (manifest.strategy, manifest.mesh) == (self.job.config.strategy["name"], self.job.mesh.sizes):
            with Reader(folder, manifest) as reader:
                checkpoint.load_draws(reader, trainer.global_rank, trainer.strategy.root_device)
        else:  # there is no telling which numbers a rank of another strategy would draw next
            draw_anew(self.job.config.seed + manifest.step)


def check_module(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """ValueError for state that a checkpoint would leave out without a word."""
    kind = type(module).__name__
    for hook in ("on_save_checkpoint", "on_load_checkpoint"):
        if is_overridden(hook, module, pl.LightningModule):
            raise ValueError(
                f"checkpoint: {kind}.{hook} is not called, since no rank has the whole state; keep what it saves in a "
                f"persistent buffer, or set checkpoint.every_steps=null and checkpoint.at_end=false."
            )
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise ValueError(
            f"checkpoint: {kind} has {len(trainer.optimizers)} optimizers, or optimizes manually, and of such a model "
            f"no checkpoint is made; set checkpoint.every_steps=null and checkpoint.at_end=false."
        )


def plain(scheduler: LRScheduler) -> dict[str, Any]:
    """A schedule's state as far as JSON knows it: counts, and rates by group."""
    kinds = (int, float, str, bool, type(None))
    return {
        key: value
        for key, value in scheduler.state_dict().items()
        if isinstance(value, kinds) or (isinstance(value, list) and all(isinstance(item, kinds) for item in value))
    }


def restore_schedule(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put a schedule, and its optimizer's rates, where they were; base rates are those of the config at hand."""
    counts = {key: value for key, value in state.items() if not isinstance(value, list)}
    scheduler.load_state_dict({**scheduler.state_dict(), **counts})
    if isinstance(scheduler, LambdaLR):
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    else:
        factors = factors_of(scheduler, state["_last_lr"], state["base_lrs"])
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def factors_of(scheduler: LRScheduler, rates: Sequence[float], bases: Sequence[float]) -> list[float]:
    """By what each group's rate had been multiplied.

    A rank may have fewer groups than the one that spoke for all; then all must have been moved alike.
    """
    factors = [rate / base if base else 1.0 for rate, base in zip(rates, bases, strict=True)]
    wanted = len(scheduler.base_lrs)
    if len(factors) == wanted:
        return factors
    if max(factors) - min(factors) <= 1e-9 * max(map(abs, factors)):
        return factors[:1] * wanted
    raise ValueError(
        f"resume: {type(scheduler).__name__} moved the {len(factors)} groups of the checkpoint's optimizer by factors "
        f"of their own, and a rank here has {wanted}; resume under the strategy that wrote it."
    )


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
