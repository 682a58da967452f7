"""debug=nan: the first module whose output or gradient is no number ends the run, and is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, final

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from models.steps import steps_done
from strategies.engines.grid import GridEngine
from strategies.schedules import Step


@final
class NanFinder(pl.Callback):
    """Looks at what goes into and comes out of every module in training, and at their gradients; each look is a sync.

    Modules are known by their names in the LightningModule, under every strategy. Of tensors that are split over ranks
    each looks at its part; a NaN that another rank's part sends it in backward may be put down to the part of a module.
    In what modules hand on, -inf is no fault: masks and log-probabilities are made of it.
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.of_backward: list[RemovableHandle] = []
        self.watched: set[Tensor] = set()  # parameters
        self.faulty: set[str] = set()  # modules whose outputs' gradients are
        self.inside: list[str] = []  # modules that are being called, the innermost last
        self.micro_batch = 0
        self.suspect: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer, self.module = trainer, pl_module
        self.done, self.steps = steps_done(trainer), None
        if isinstance(trainer.strategy, GridEngine) and trainer.strategy.steps:
            self.steps = trainer.strategy.steps
            self.steps.pipeline.around = self.around(self.steps.pipeline.around)
        for fqn, part in pl_module.named_modules():
            if fqn and not isinstance(part, Metric):
                self.handles += [
                    part.register_forward_pre_hook(self.entering(fqn), with_kwargs=True),
                    part.register_forward_hook(self.leaving(fqn), with_kwargs=True),
                ]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        first = steps_done(trainer) != self.done or self.micro_batch == 0
        self.micro_batch = 1 if first else self.micro_batch + 1
        self.done, self.micro_of_pipeline = steps_done(trainer), 0

    def on_after_backward(self, *_: Any) -> None:
        """No module was found to have made what reached them."""
        is_last = self.steps is None or self.steps.last_unit is not None  # other stages have it from that
        if self.suspect and is_last:
            self.end(self.suspect)
        if self.module.automatic_optimization:
            self.forget_backward()

    def on_train_batch_end(self, *_: Any) -> None:
        self.forget_backward()  # of a module that goes backward when it likes, as often as it likes

    def forget_backward(self) -> None:
        self.let_go(self.of_backward)
        self.watched.clear()
        self.faulty.clear()

    def on_train_end(self, *_: Any) -> None:
        self.let_go(self.handles)

    def let_go(self, handles: list[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    def around(self, before: Callable[[Step], Any]) -> Callable[[Step], Any]:
        """Of a pipeline's steps: which micro-batch they work at."""

        @contextmanager
        def watched(step: Step) -> Iterator[None]:
            self.micro_of_pipeline = step.micro
            with before(step):
                yield

        return watched

    # --- forward ----------------------------------------------------------------------------------------------------

    @property
    def looks(self) -> bool:
        # Not at activations that are computed again in backward.
        return self.trainer.training and torch._C._current_graph_task_id() == -1

    def entering(self, fqn: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.looks:
                return
            if word := fault([args, kwargs]):
                if self.inside:
                    self.end(f"{self.inside[-1]} gives {word} in its forward, to {fqn}; its own input was finite")
                self.end(f"{fqn} is given {word}, which no module has made; look at that step's samples")
            self.inside.append(fqn)

        return hook

    def leaving(self, fqn: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.looks:
                return
            self.inside.pop()
            if word := fault(output):
                weights = fault(list(part.parameters()), any_infinity=True)
                what = f"its input was finite, its weights hold {weights}" if weights else "its input was finite"
                self.end(f"{fqn} gives {word} in its forward; {what}")
            if torch.is_grad_enabled():
                self.watch_gradients(fqn, part, [args, kwargs], output)

        return hook

    # --- backward ---------------------------------------------------------------------------------------------------

    def watch_gradients(self, fqn: str, part: nn.Module, inputs: Any, output: Any) -> None:
        """Of one call of a module: a fault in the gradient of an input or a weight, of none in that of the output."""
        faults: list[str] = []  # in the gradient of the output

        def of_output(gradient: Tensor) -> None:
            if word := fault(gradient, any_infinity=True):
                faults.append(word)
                self.faulty.add(fqn)
                self.suspect = self.suspect or (
                    f"the gradient of {fqn}'s output is {word}, and no module has made it; look at the loss"
                )

        def of_input(gradient: Tensor) -> None:
            if not faults and (word := fault(gradient, any_infinity=True)):
                self.blame(fqn, word, "its input")

        def of_parameter(name: str, gradient: Tensor) -> None:
            # Not by `faults`: in a pipeline, other calls of the module may lie between this one and its backward.
            if fqn not in self.faulty and (word := fault(gradient, any_infinity=True)):
                self.blame(fqn, word, name)

        for tensor in differentiable(output):
            self.of_backward.append(tensor.register_hook(of_output))
        for tensor in differentiable(inputs):
            self.of_backward.append(tensor.register_hook(of_input))
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in self.watched:
                self.watched.add(parameter)
                self.of_backward.append(parameter.register_hook(partial(of_parameter, name)))

    def blame(self, fqn: str, word: str, what: str) -> NoReturn:
        self.end(f"{fqn} gives {word} in its backward, as the gradient of {what}; that of its output was finite")

    def end(self, cause: str) -> NoReturn:
        per_batch = self.steps.spec.micro_batches if self.steps else 1
        micro_batch = (self.micro_batch - 1) * per_batch + self.micro_of_pipeline + 1
        what, _, more = cause.partition("; ")
        raise ValueError(
            f"debug=nan: {what}, in optimizer step {steps_done(self.trainer) + 1}, micro-batch {micro_batch}, on rank "
            f"{self.trainer.global_rank}; {more}."
        )


def fault(tree: Any, *, any_infinity: bool = False) -> str | None:
    """`nan` or `inf` if some tensor holds one."""
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.is_meta:
            continue
        local = (leaf.to_local() if isinstance(leaf, DTensor) else leaf).detach()
        if local.isnan().any():
            return "nan"
        if (local.isinf() if any_infinity else local.isposinf()).any():
            return "inf"
    return None


def differentiable(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]
