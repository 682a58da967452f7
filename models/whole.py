"""Norms of the whole model, for a LightningModule's hooks, under every strategy."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm


@runtime_checkable
class ShowsNorms(Protocol):
    """What Concord's engines know of a model that lies in parts on many ranks."""

    def gradient_norm(self) -> Tensor: ...

    def parameter_norm(self) -> Tensor: ...


def gradient_norm(module: LightningModule) -> Tensor:
    """L2 norm (scalar) of the global batch's gradient over all parameters, before clipping.

    To be called on every rank in `on_before_optimizer_step`, where `parameter.grad` is a part, or None, under ZeRO,
    FSDP, tensor and pipeline parallelism. Under a strategy of Lightning's own it is read there.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, ShowsNorms):
        with torch._C.DisableTorchFunction():  # it may read parts, to make a whole of them
            return strategy.gradient_norm()
    return get_total_norm([one.grad for one in module.parameters() if one.grad is not None])


def parameter_norm(module: LightningModule) -> Tensor:
    """L2 norm (scalar) of all weights, as the optimizer holds them, to be called on every rank outside of a forward."""
    strategy = module.trainer.strategy
    if isinstance(strategy, ShowsNorms):
        with torch._C.DisableTorchFunction():
            return strategy.parameter_norm()
    return torch.linalg.vector_norm(torch.stack([one.detach().norm() for one in module.parameters()]))
