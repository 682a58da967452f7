"""A run of plain Lightning on one process, which certificates compare with: nothing of Concord's engines is in it.

Concord gives it the user's module as it stands, its first weights, and the samples in their order. Trainer, optimizer
steps, precision and accumulation are Lightning's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from launch.batches import end_by_batches
from launch.job import Job
from launch.still import WithoutDropout
from launch.weights import StartingWeights
from models.steps import steps_done
from strategies.engines.checkpoint import Held, persistent_buffers
from strategies.engines.construction import constructing
from strategies.engines.draws import generators_of, seed_draws, seed_of
from strategies.engines.materialize import materialize
from tracking.evidence import TRAITS
from tracking.evidence_recorder import EvidenceRecorder
from tracking.module_recorder import ModuleRecorder

SHOWN = 3  # modules of a kind that are named


class PlainState:
    """What a certificate compares, read from a module that is whole."""

    loss_factor = 1.0

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.dtypes: dict[str, str] = {}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": 1, "rank": 0}

    def gradient_norm(self) -> Tensor:
        groups = [group for optimizer in self.module.trainer.optimizers for group in optimizer.param_groups]
        gradients = [one.grad for group in groups for one in group["params"] if one.grad is not None]
        wide = torch.promote_types(gradients[0].dtype, torch.float32) if gradients else torch.float32
        return get_total_norm([gradient.to(wide) for gradient in gradients])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for fqn, parameter in self.module.named_parameters():
            yield fqn, parameter.detach().cpu()


class Draws(pl.Callback):
    """Seeds each micro-batch by its place in the global batch, as every engine does, and notes whether any is drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.has_drawn = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        device = trainer.strategy.root_device
        seed_draws(seed_of(self.seed, steps_done(trainer), batch_idx % trainer.accumulate_grad_batches), device)
        self.generators = generators_of(device)
        self.before = [generator.get_state() for generator in self.generators]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_draws(seed_of(self.seed, "validation", batch_idx), trainer.strategy.root_device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        now = [generator.get_state() for generator in self.generators]
        self.has_drawn |= not all(map(torch.equal, self.before, now))


class ClipsFused(pl.Callback):
    """Lets Lightning clip gradients of a fused optimizer under autocast: without a scaler it unscales nothing."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.scaler is None:
            for optimizer in trainer.optimizers:
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def train_plainly(job: Job, model: LightningModule, guests: Sequence[pl.Callback] = ()) -> None:
    """Train `model` as plain Lightning does, and leave evidence and what was noticed of it in the run folder."""
    config = job.config
    seed_everything(config.seed, workers=True, verbose=False)
    with constructing(model):
        model.configure_model()
    materialize(model, torch.device("cpu"), config.seed)
    if config.weights is not None:
        held = [*model.named_parameters(), *persistent_buffers(model)]
        StartingWeights(Path(config.weights), model, config.fitting).load(
            Held.whole(fqn, tensor, writes=True) for fqn, tensor in held
        )
    model.configure_model = lambda: None  # type: ignore[method-assign]  # it has been called
    draws, quiet = Draws(config.seed), WithoutDropout(model)
    callbacks: list[pl.Callback] = [*guests, draws, ClipsFused(), EvidenceRecorder(job.run_dir, PlainState(model))]
    if config.evidence_step is not None:
        callbacks.append(ModuleRecorder(job.run_dir, config.evidence_step, PlainState(model)))
    trainer = Trainer(
        accelerator=config.launcher.accelerator,
        devices=1,
        precision=cast(Any, config.precision.lightning),
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=job.accumulation,
        gradient_clip_val=config.trainer.clip_norm,
        val_check_interval=config.trainer.max_steps * job.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=job.run_dir,
    )
    if not model.automatic_optimization:
        end_by_batches(trainer)
    with quiet:
        trainer.fit(model, datamodule=job.data.build())
    traits = {
        "draws": draws.has_drawn,
        "dropout": quiet.found,
        "batch_norms": names_of(model, _BatchNorm),
        "manual": not model.automatic_optimization,
        "optimizer": type(trainer.optimizers[0]).__name__,
    }
    (job.run_dir / "evidence" / TRAITS).write_text(json.dumps(traits, indent=2) + "\n")


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [fqn for fqn, part in model.named_modules() if isinstance(part, kind)][:SHOWN]
