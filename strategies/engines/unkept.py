"""What of a module, or of what its optimizer keeps, no checkpoint can hold: it is told before it is lost."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.engines.checkpoint import KNOWN, Holds, tensors_of


def unheld(module: nn.Module) -> str | None:
    """What of a module's state_dict is no tensor that can be saved; None where there is nothing."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for fqn, value in module.state_dict(keep_vars=True).items():
        if fqn not in tensors:
            return f"{fqn} is in the state_dict, but no parameter or buffer; keep it in a persistent buffer."
        if value.layout != torch.strided or value.dtype not in KNOWN:
            kind = str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")
            return f"{fqn} is of {kind}, which no checkpoint holds; use another format, or persistent=False."
    return None


def beside(optimizer: Optimizer) -> str | None:
    """What an optimizer's own state_dict has beside its state and groups; None where there is nothing."""
    kept, optimizer.state = optimizer.state, defaultdict(dict)  # of parameters that DeepSpeed has not in its groups now
    try:
        extra = optimizer.state_dict().keys() - {"state", "param_groups"}
    finally:
        optimizer.state = kept
    if not extra:
        return None
    return (
        f"{type(optimizer).__name__}.state_dict has {str(min(extra))[:100]}, and of an optimizer its state and "
        f"param_groups are saved; keep it there."
    )


def unkept_by(engine: Holds) -> str | None:
    """What an optimizer keeps, behind a step, that cannot be saved; None where there is nothing."""
    optimizer = engine.stepping
    strange = [key for key in optimizer.state if not isinstance(key, Tensor)]
    if strange:
        return f"{type(optimizer).__name__} keeps {str(strange[0])[:100]} in its state for no parameter"
    try:
        for held in engine.held():
            for _ in tensors_of(held, optimizer):
                pass
    except ValueError as error:
        return str(error)
    return None
