"""What every engine does around the training step of a micro-batch: seeds what it draws, and weighs its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from models.steps import steps_done
from strategies.engines.construction import constructing
from strategies.engines.draws import draws_of, seed_draws, seed_of
from strategies.engines.finite import StepGuard
from strategies.engines.loss_terms import times
from strategies.engines.outputs import check_output
from strategies.engines.own_code import Reads
from strategies.spec import Run


class MicroBatches(Strategy):
    """Mixed into every engine.

    A micro-batch draws by its place in the global batch: other numbers than the others', the same ones on whichever
    rank it is, and again when the run is resumed there.
    """

    run: Run
    guard: StepGuard
    loss_group: dist.ProcessGroup | None = None  # ranks that have a loss at the same time; None is all

    @property
    def trained(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def loss_factor(self) -> float:
        """By what the losses of the step that has just been made are to be multiplied, to be shares of its mean."""
        return self.guard.terms.factor

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lightning calls `configure_model` inside; nets on the meta device are sharded as they are initialised."""
        with constructing(self.trained):
            yield

    def reads(self) -> Reads | None:
        """What the module's own code may not read, since this rank has a part of it; None where all is whole."""
        return None

    def restored(self, without_state: frozenset[str]) -> None:
        """What the run that wrote a checkpoint had never stepped has no state here either, unless an engine says so."""

    def parameter_norm(self) -> Tensor:
        """L2 norm of all weights as they are stepped (scalar); collective, the same on every rank."""
        named = {fqn for fqn, _ in self.trained.named_parameters()}
        total = torch.zeros((), dtype=torch.float64, device=self.root_device)
        for held in self.held():  # type: ignore[attr-defined]
            if held.writes and held.name in named:
                parts = [part.detach().to(self.root_device).double() for part in held.select(held.stepped)]
                total += sum(part.square().sum() for part in parts)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.sqrt().float()

    def on_train_start(self) -> None:
        super().on_train_start()
        if (reads := self.reads()) is not None:
            reads.watch()
        call_per_step(self.trained)
        # What a loader in this process draws, before the first step and between steps.
        self.seed_by("loading", steps_done(self.trained.trainer), self.slicing["rank"])

    @property
    def is_first(self) -> bool:
        """Whether the micro-batch under way is its step's first, before whose backward Lightning zeroes gradients."""
        trainer = self.trained.trainer
        return trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_first:
            self.guard.begin()
        self.seed_by(*self.place())
        return self.weighed(super().training_step(*args, **kwargs))

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.validation_draws():
            return super().validation_step(*args, **kwargs)

    def validation_draws(self) -> AbstractContextManager[None]:
        """Inside, a batch of validation draws by its place among all ranks' batches, each time the same.

        What training draws is as if there had been no validation.
        """
        batch = self.trained.trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready - 1
        place = batch * self.slicing["num_replicas"] + self.slicing["rank"]
        return draws_of(seed_of(self.run.seed, "validation", place), self.root_device)

    @property
    def slicing(self) -> dict[str, int]:
        """`num_replicas` and `rank`: how many ranks see different samples, and which of them this one is."""
        kwargs: dict[str, int] = self.distributed_sampler_kwargs  # type: ignore[attr-defined]
        return kwargs

    def place(self) -> tuple[int, int]:
        """Of the micro-batch under way: its optimizer step, and its number in the global batch (datamodules.order)."""
        trainer = self.trained.trainer
        number = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches
        return steps_done(trainer), number * self.slicing["num_replicas"] + self.slicing["rank"]

    def seed_by(self, *place: object) -> None:
        seed_draws(seed_of(self.run.seed, *place), self.root_device)

    def weighed(self, output: Any) -> Any:
        """What a training step returned, with its loss weighed by its terms."""
        check_output(self.trained, output)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if output is None or not self.trained.automatic_optimization:
            return output
        weight = self.guard.terms.weight_of(output, share=1.0, samples=self.run.micro_batch_size, group=self.loss_group)
        loss = times(loss, weight)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def call_per_step(module: pl.LightningModule) -> None:
    """Have the module's hooks for a batch called for each global batch, not for each micro-batch.

    How many micro-batches there are is nothing that a module may depend on: an average of weights that is taken in
    `on_train_batch_end` would move twice as far in one process as on two ranks.
    """
    micro_batches = module.trainer.accumulate_grad_batches
    if micro_batches == 1:
        return
    for hook, place in (("on_train_batch_start", 0), ("on_train_batch_end", micro_batches - 1)):
        if is_overridden(hook, module, pl.LightningModule):
            setattr(module, hook, partial(only_at, place, micro_batches, getattr(module, hook)))


def only_at(place: int, micro_batches: int, hook: Callable[..., Any], *args: Any) -> Any:
    """Call `hook`, whose last argument is the number of a micro-batch, at one of those of a step alone."""
    *others, batch_idx = args
    return hook(*others, batch_idx // micro_batches) if batch_idx % micro_batches == place else None
