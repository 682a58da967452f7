"""Writes down what each rank shows of its computation; tracking.evidence reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from models.steps import steps_done


class ShowsState(Protocol):
    """What every engine must be able to show of the state it spreads, whatever it spread and how."""

    dtypes: dict[str, str]
    """Formats that were really in use, read from the tensors once all was set up: `parameter`, `reduce`, `master`."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """`num_replicas` and `rank`: how many ranks see different samples, and which of them this one is."""
        ...

    @property
    def loss_factor(self) -> float:
        """By what the losses of the last step's micro-batches are to be multiplied, to be shares of its mean."""
        ...

    def gradient_norm(self) -> Tensor:
        """L2 norm of the whole model's gradient before clipping (scalar); collective, the same on every rank."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the model that this rank can see, whole, on CPU, under its FQN; collective."""
        ...


@dataclass
class StepEvidence:
    """One optimizer step as one rank saw it."""

    samples: list[str] = field(default_factory=list)  # digest of each sample, in the order of its micro-batches
    losses: list[float] = field(default_factory=list)  # of each micro-batch, mean over its samples
    gradient_norm: float = 0.0  # L2 over the whole model, before clipping


def sample_digests(batch: Any) -> list[str]:
    """A digest of each sample's content, over all tensors of the batch; says which samples were really used.

    None of a batch that has shapes but no content: its rank looks at no sample.
    """
    leaves = [leaf.detach() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if any(leaf.is_meta for leaf in leaves):
        return []
    leaves = [leaf.cpu() for leaf in leaves]
    # Rounded to float32: in a float64 run Lightning casts inputs, and the samples are still the same ones.
    rows = [leaf.float() if leaf.is_floating_point() else leaf for leaf in leaves]
    return [
        blake2b(b"".join(leaf[index].numpy().tobytes() for leaf in rows), digest_size=8).hexdigest()
        for index in range(len(rows[0]))
    ]


class EvidenceRecorder(pl.Callback):
    """Writes evidence/<rank>.json and evidence/<rank>.npz into the run folder, on every rank."""

    def __init__(self, run_dir: Path, shows: ShowsState | None = None) -> None:
        """`shows` speaks for a strategy that shows nothing of itself, such as Lightning's own."""
        self.folder = run_dir / "evidence"
        self.shows = shows
        self.first_weights: dict[str, np.ndarray] = {}
        self.steps: list[StepEvidence] = [StepEvidence()]
        self.first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step = steps_done(trainer)  # of a run that goes on from a checkpoint
        self.shows = self.shows or cast(ShowsState, trainer.strategy)
        self.first_weights = {fqn: wide(weight).copy() for fqn, weight in self.shows.weights()}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.steps[-1].samples += sample_digests(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if pl_module.automatic_optimization:
            self.steps[-1].gradient_norm = float(self.state.gradient_norm())
        else:  # of all that is stepped by in a batch; nothing of it is in parts
            self.steps[-1].gradient_norm = math.hypot(self.steps[-1].gradient_norm, norm_of(optimizer))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not pl_module.automatic_optimization:
            self.steps[-1].losses.append(float(loss.detach()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if pl_module.automatic_optimization and isinstance(loss, Tensor):
            # Lightning hands out the loss divided by the accumulation.
            self.steps[-1].losses.append(float(loss) * trainer.accumulate_grad_batches)
        if steps_done(trainer) - self.first_step == len(self.steps):
            factor = self.state.loss_factor
            # A step may have none: it was left out, or its module went no way backward.
            self.steps[-1].losses = [factor * loss for loss in self.steps[-1].losses] or [0.0]
            self.steps.append(StepEvidence())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        val_loss = trainer.callback_metrics.get("val/loss")
        report = {
            "rank": trainer.global_rank,
            "data_rank": self.state.distributed_sampler_kwargs["rank"],
            "steps": [vars(step) for step in self.steps if step.losses],
            "val_loss": None if val_loss is None else float(val_loss),
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(report))
        weights = {fqn: wide(weight) for fqn, weight in self.state.weights()}
        for name, held in (("", weights), (".first", self.first_weights)):
            np.savez(self.folder / f"{trainer.global_rank}{name}.npz", **held)  # type: ignore[arg-type]  # names are ours

    @property
    def state(self) -> ShowsState:
        assert self.shows is not None
        return self.shows


def norm_of(optimizer: Optimizer) -> float:
    """L2 norm of the gradients that an optimizer is to step by."""
    gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    return float(get_total_norm([gradient.to(torch.float64) for gradient in gradients]))


def wide(weight: Tensor) -> np.ndarray:
    """A weight as numpy: bfloat16 and float16, which lose nothing by it, as float32."""
    return (weight if weight.dtype == torch.float64 else weight.float()).numpy()
