"""Writes down what every module gives, and gets back as a gradient, in one optimizer step; tracking.bisect reads it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from models.steps import steps_done
from tracking.evidence import modules_path
from tracking.evidence_recorder import ShowsState


class ModuleRecorder(pl.Callback):
    """Of one optimizer step, on every rank: weights before and behind it, and each module's values and gradients."""

    def __init__(self, run_dir: Path, step: int, shows: ShowsState | None = None) -> None:
        """`shows` speaks for a strategy that shows nothing of itself, such as Lightning's own."""
        self.folder, self.step, self.shows = run_dir / "evidence", step, shows
        self.handles: list[RemovableHandle] = []
        self.calls: list[dict[str, Any]] = []
        self.weights: dict[str, dict[str, list[float]]] = {}
        self.number = 0  # of the micro-batch under way, among its rank's

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if steps_done(trainer) == self.step + 1 and self.handles:
            self.finish(trainer)
        if steps_done(trainer) != self.step:
            return
        self.number = batch_idx % trainer.accumulate_grad_batches
        if self.number == 0:
            self.weights["before"] = self.look(trainer)
            for fqn, part in pl_module.named_modules():
                if part is not pl_module:
                    self.handles.append(part.register_forward_hook(partial(self.gives, fqn)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.handles:
            self.finish(trainer)

    def gives(self, fqn: str, module: Any, inputs: Any, output: Any) -> None:
        if not module.training or torch._C._current_graph_task_id() != -1:
            return  # a validation, or a backward that computes a block again
        for leaf in filter(is_whole, tree_leaves(output)):
            self.note(fqn, "value", self.number, leaf)
            if leaf.requires_grad:
                leaf.register_hook(partial(self.note, fqn, "gradient", self.number))

    def note(self, fqn: str, kind: str, number: int, tensor: Tensor) -> None:
        if is_whole(tensor):
            self.calls.append({"fqn": fqn, "kind": kind, "number": number, "digest": digest(tensor)})

    def look(self, trainer: pl.Trainer) -> dict[str, list[float]]:
        shows = self.shows or cast(ShowsState, trainer.strategy)
        return {fqn: digest(weight) for fqn, weight in shows.weights()}

    def finish(self, trainer: pl.Trainer) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.weights["behind"] = self.look(trainer)
        slicing = (self.shows or cast(ShowsState, trainer.strategy)).distributed_sampler_kwargs
        self.folder.mkdir(parents=True, exist_ok=True)
        report = {"slicing": slicing, "weights": self.weights, "calls": self.calls}
        modules_path(self.folder, trainer.global_rank).write_text(json.dumps(report))


def is_whole(leaf: Any) -> bool:
    """Whether it is a plain tensor of numbers, and not one that is spread over ranks."""
    return type(leaf) in (Tensor, nn.Parameter) and leaf.is_floating_point()


def digest(tensor: Tensor) -> list[float]:
    """Number of elements, L2 norm, and two projections, by which tensors of one shape can be told apart."""
    flat = tensor.detach().reshape(-1).to("cpu", torch.float64)
    places = torch.arange(flat.numel(), dtype=torch.float64)
    return [flat.numel(), float(flat.norm()), float(flat @ places.cos()), float(flat @ (places * 0.7 + 1).sin())]
