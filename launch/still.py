"""What runs that are made to be compared leave to no chance: dropout is off, noise is the same in every format."""

from __future__ import annotations

from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# With the place of their arguments that say how much is dropped, by position and by name.
DROPOUTS = {
    functional.dropout: (1, "p"),
    functional.alpha_dropout: (1, "p"),
    functional.feature_alpha_dropout: (1, "p"),
    functional.dropout1d: (1, "p"),
    functional.dropout2d: (1, "p"),
    functional.dropout3d: (1, "p"),
    torch.dropout: (1, "p"),
    functional.scaled_dot_product_attention: (4, "dropout_p"),
}


# Draw other numbers in another format, and not the same ones rounded.
MADE_AT_RANDOM = {torch.rand, torch.randn, torch.rand_like, torch.randn_like}
FILLED_AT_RANDOM = {Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.log_normal_, Tensor.cauchy_}


class WithoutDropout(TorchFunctionMode):
    """Nothing is dropped inside: neither by modules nor by functions that are called with a share to drop.

    Noise of a module's own is left alone, but drawn in float32 and then cast: the exact run, in float64, has the same.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.found: list[str] = []

    def __enter__(self) -> Self:
        self.quieten()
        super().__enter__()
        return self

    def quieten(self) -> None:
        """For what runs outside: compiled blocks, and the recurrent layers' own kernels."""
        for fqn, part in self.module.named_modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
                self.found.append(fqn)
                part.p = 0.0
            if isinstance(part, nn.RNNBase) and part.dropout > 0:
                self.found.append(fqn)
                part.dropout = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in MADE_AT_RANDOM:
            return in_float32(func, args, kwargs)
        if func in FILLED_AT_RANDOM and args[0].is_floating_point() and args[0].dtype != torch.float32:
            with torch.no_grad():
                return args[0].copy_(func(args[0].float(), *args[1:], **kwargs))
        if func in DROPOUTS:
            place, name = DROPOUTS[func]
            share = args[place] if len(args) > place else kwargs.get(name, 0.0 if name == "dropout_p" else 0.5)
            if share:
                if self.found[-1:] != [func.__name__]:
                    self.found.append(func.__name__)
                if len(args) > place:
                    args = (*args[:place], 0.0, *args[place + 1 :])
                else:
                    kwargs[name] = 0.0
        return func(*args, **kwargs)


def in_float32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    like = args[0].dtype if args and isinstance(args[0], Tensor) else torch.get_default_dtype()
    dtype = kwargs.get("dtype") or like
    if not dtype.is_floating_point or "out" in kwargs:
        made: Tensor = func(*args, **kwargs)
        return made
    requires_grad = kwargs.pop("requires_grad", False)
    return func(*args, **{**kwargs, "dtype": torch.float32}).to(dtype).requires_grad_(requires_grad)


class Still(pl.Callback):
    """Quietens a module once its net is there."""

    def __init__(self, mode: WithoutDropout) -> None:
        self.mode = mode

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.mode.quieten()
