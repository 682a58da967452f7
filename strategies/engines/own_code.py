"""Runs a module's own steps and hooks so that a part of a tensor is never taken for the whole.

Under ZeRO-3, FSDP, tensor and pipeline parallelism a parameter outside of the net's forward is a part, or nothing, and
a gradient may be gone before a hook sees it. Code that reads one all the same (a penalty, a norm that is logged, a
moving average of weights) would go on with a wrong number; here it ends, with a word on what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import CodeType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from strategies.engines.construction import CONSTRUCTIONS

HOOKS = (
    "training_step",
    "validation_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "on_before_optimizer_step",
)
TENSOR: Any = Tensor
GRADIENT = TENSOR.grad.__get__
# Whose code knows of parts, and is called to make a whole of them.
KNOW_OF_PARTS = (
    "deepspeed.",
    "launch.",
    "strategies.",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "tracking.",
)
# What is right of a part, too, or does nothing to it.
HARMLESS = {
    GRADIENT,
    TENSOR.grad.__set__,
    TENSOR.grad.__delete__,
    TENSOR.requires_grad.__get__,
    TENSOR.requires_grad_,
    TENSOR.is_leaf.__get__,
    TENSOR.device.__get__,
    TENSOR.dtype.__get__,
    TENSOR.is_cuda.__get__,
    TENSOR.is_floating_point,
    TENSOR.__hash__,
}


class Reads:
    """What a rank's module may not read: parameters that are a part, and gradients that are, or are not there.

    is_part: whether a parameter is, now. has_gradients: whether each parameter's gradient is that of the global batch
    by the time of the hooks behind backward. has_all: whether this rank has all parameters.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        strategy: str,
        *,
        is_part: Callable[[Tensor], bool],
        has_gradients: bool,
        has_all: bool,
        net: nn.Module | None = None,
    ) -> None:
        self.module, self.strategy, self.net = module, strategy, net
        self.is_part, self.has_gradients, self.has_all = is_part, has_gradients, has_all
        self.names = {id(parameter): fqn for fqn, parameter in module.named_parameters()}
        self.mode = _Watching(self)
        self.hook = ""  # that runs
        self.inside = 0  # of forwards that may read what they like
        self.is_off = False  # whether the mode is, until they are over

    def watch(self) -> None:
        """Have the module's own steps and hooks watched from now on."""
        for hook in HOOKS:
            if is_overridden(hook, self.module, pl.LightningModule):
                setattr(self.module, hook, self.watched(hook, getattr(self.module, hook)))
        for part in self.module.children():
            part.register_forward_pre_hook(lambda *_: self.enter(), prepend=True)
            part.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def watched(self, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)  # by its signature Lightning knows what to call it with
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.watching(hook):
                return call(*args, **kwargs)

        return run

    @contextmanager
    def watching(self, hook: str) -> Iterator[None]:
        before, self.hook = self.hook, hook
        try:
            if before:  # one hook calls another, as a validation_step may training_step
                yield
            else:
                with self.watching_outermost():
                    yield
        finally:
            self.hook = before

    @contextmanager
    def watching_outermost(self) -> Iterator[None]:
        self.inside = 0
        whole = [] if self.has_all else [self.module, *([self.net] if self.net is not None else [])]
        for part in whole:
            part.named_parameters = self.named_parameters_of(part)  # type: ignore[method-assign]
        self.mode.__enter__()
        try:
            yield
        finally:
            if not self.is_off:  # it is where a net's call was left by no ordinary exception, as a pipeline's is
                self.mode.__exit__(None, None, None)
            self.is_off = False
            for part in whole:
                del part.named_parameters

    def enter(self) -> None:
        """A forward of the net begins: it is let alone, and costs nothing, until it is over."""
        self.inside += 1
        if self.inside == 1 and self.hook and _get_current_function_mode() is self.mode:
            self.mode.__exit__(None, None, None)
            self.is_off = True

    def leave(self) -> None:
        self.inside -= 1
        if self.inside == 0 and self.is_off:
            self.is_off = False
            self.mode.__enter__()

    def look(self, function: Any, args: tuple[Any, ...]) -> None:
        """ValueError if a call by the module's own code reads what it may not."""
        if sys._getframe(2).f_globals.get("__name__", "").startswith(KNOW_OF_PARTS):
            return
        if function == GRADIENT:  # a new object at each access
            if not self.has_gradients and id(args[0]) in self.names:
                raise self.refused(f"the gradient of {self.names[id(args[0])]}", "gradient_norm")
            return
        if function in HARMLESS:
            return
        for leaf in args:
            for one in leaf if isinstance(leaf, list | tuple) else (leaf,):
                if isinstance(one, nn.Parameter) and id(one) in self.names and self.is_part(one):
                    raise self.refused(f"parameter {self.names[id(one)]}", "parameter_norm")

    def named_parameters_of(self, part: nn.Module) -> Callable[..., Any]:
        """What stands for `part.named_parameters` while the module's own code runs."""
        all_there_are = type(part).named_parameters

        def named_parameters(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
                frame = frame.f_back  # `parameters` asks for names, too
            if not frame.f_globals.get("__name__", "").startswith(KNOW_OF_PARTS):
                raise self.refused("all parameters", "parameter_norm or gradient_norm")
            return all_there_are(part, *args, **kwargs)

        return named_parameters

    def refused(self, what: str, accessor: str) -> ValueError:
        kind = type(self.module).__name__
        return ValueError(
            f"strategy={self.strategy}: {kind}.{self.hook} reads {what}, of which a rank has a part at most; call "
            f"{accessor} of models.whole instead (a penalty on weights is the optimizer's weight_decay), or choose "
            f"strategy=ddp."
        )


def check_copies(module: pl.LightningModule, strategy: str) -> None:
    """ValueError if a hook of the module speaks of a frozen copy of other parameters, which it is to move after them.

    Where both lie in parts on the ranks, an average taken element by element goes by parts that need not fit.
    """
    kind = type(module)
    hooks = [hook for hook in HOOKS if hook.startswith("on_") and is_overridden(hook, module, pl.LightningModule)]
    spoken_of = {hook: names_in(kind, hook) for hook in hooks}
    for copy, original in copies(module) if hooks else ():
        name = copy.split(".")[0]
        hook = next((hook for hook in hooks if name in spoken_of[hook]), None)
        if hook is not None:
            raise ValueError(
                f"strategy={strategy}: {kind.__name__}.{hook} moves {name}, a frozen copy of "
                f"{original.split('.')[0]}, and a rank has only a part of each; choose strategy=ddp, zero1 or zero2."
            )


def copies(module: nn.Module) -> Iterator[tuple[str, str]]:
    """FQNs of frozen parameters, each with that of a parameter it starts as a copy of."""
    construction = CONSTRUCTIONS.get(module)
    named = dict(module.named_parameters())
    for fqn, parameter in named.items():
        if parameter.requires_grad:
            continue
        if parameter.is_meta:
            original = construction.copied_from(fqn) if construction else None
        else:
            alike = (name for name, other in named.items() if other.requires_grad and equal(parameter, other))
            original = next(alike, None)
            if original is not None and bool((parameter == parameter.flatten()[:1]).all()):
                original = None  # zeros or ones, as many a parameter has at the start
        if original is not None:
            yield fqn, original


def equal(one: Tensor, other: Tensor) -> bool:
    return not other.is_meta and one.shape == other.shape and torch.equal(one, other)


def names_in(kind: type, method: str) -> set[str]:
    """Names of attributes in the code of a method, and of those methods of the user's own that it calls."""
    names, todo, seen = set[str](), [method], set[str]()
    while todo:
        name = todo.pop()
        own = getattr(kind, name, None)
        code = getattr(own, "__code__", None)
        if name in seen or code is None or own is getattr(pl.LightningModule, name, None):
            continue
        seen.add(name)
        inside = [one for one in code.co_consts if isinstance(one, CodeType)]
        found = set(code.co_names).union(*(one.co_names for one in inside))
        names |= found
        todo += found
    return names


class _Watching(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.reads.inside:
            self.reads.look(func, args)
        return func(*args, **(kwargs or {}))
