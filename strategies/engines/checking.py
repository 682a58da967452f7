"""Engines that step with torch's own optimizers: what is asked, and done to gradients, before an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from strategies.engines.micro_batches import MicroBatches


class ChecksSteps(MicroBatches):
    """Mixed into engines whose optimizer is torch's own: asks the guard once gradients are whole, before any hook.

    A step is left out by letting go of its gradients: torch's optimizers touch neither weight nor state without one.
    """

    norm: Tensor | None = None  # that the guard has looked at, while it is used for clipping
    leaves_out = False  # whether the step under way is left out
    manual: Optimizer | None = None  # that a module which optimizes manually steps with, or has done so last

    def agreed_norm(self, optimizer: Optimizer) -> Tensor:
        """L2 norm of the whole model's gradient, which the guard has looked at; collective."""
        raise NotImplementedError

    def whole_norm(self, optimizer: Optimizer) -> Tensor:
        """The same, of which the guard is told nothing; collective."""
        raise NotImplementedError

    def scale_to(self, max_norm: float, norm: Tensor, optimizer: Optimizer) -> None:
        """Scale the gradients, which have this norm, so that it is at most `max_norm`."""
        raise NotImplementedError

    def connect_guard(self) -> None:
        """Have the precision plugin, which calls what comes between backward and step, ask the guard."""
        module, plugin = self.trained, self.precision_plugin
        if not module.automatic_optimization:
            self.connect_manual_guard()
            return
        clip_gradients, after_closure = plugin._clip_gradients, plugin._after_closure
        # What a module does to its gradients before they are clipped changes their norm.
        hooks = ("on_before_optimizer_step", "configure_gradient_clipping")
        is_stale = any(is_overridden(hook, module, pl.LightningModule) for hook in hooks)

        def check_first(model: Any, optimizer: Any) -> None:
            norm = self.agreed_norm(optimizer)
            self.leaves_out = not self.guard.passes(model.trainer)
            factor = self.guard.terms.factor
            gradients = [part.grad for part in stepped_by(optimizer) if part.grad is not None]
            if factor != 1.0 and gradients:
                torch._foreach_mul_(gradients, factor)
            self.norm = None if is_stale else norm * factor
            after_closure(model, optimizer)
            self.norm = None

        def clip_or_leave_out(module: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if not self.leaves_out:
                clip_gradients(module, optimizer, *args, **kwargs)
                return
            for part in stepped_by(optimizer):
                part.grad = None

        def clip_by_norm(optimizer: Optimizer, max_norm: float) -> None:
            self.scale_to(max_norm, self.whole_norm(optimizer) if self.norm is None else self.norm, optimizer)

        plugin._after_closure = check_first  # type: ignore[method-assign]
        plugin._clip_gradients = clip_or_leave_out  # type: ignore[method-assign,assignment]
        plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign,assignment]

    def connect_manual_guard(self) -> None:
        """Have the guard end the run before any of a module's own steps by gradients that are no numbers.

        All ranks have the same gradients by then, so that none has to ask another, however often the module steps.
        """
        after_closure = self.precision_plugin._after_closure
        scales = self.run.precision.compute == "float16"  # then the scaler leaves steps out, and lowers its scale

        def check_first(model: Any, optimizer: Any) -> None:
            self.manual = optimizer
            gradients = [part.grad for part in stepped_by(optimizer) if part.grad is not None]
            if gradients and not scales and not get_total_norm(gradients).isfinite():
                self.guard.problem = f"the gradients that {type(optimizer).__name__} is to step by are nan or inf"
                self.guard.passes(model.trainer)
            after_closure(model, optimizer)

        self.precision_plugin._after_closure = check_first  # type: ignore[method-assign]


def stepped_by(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
