"""What a LightningModule here optimizes with: which parameters decay, and when the rate changes."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Split parameters into those that decay (matrices and tables) and those that do not (biases, norms), as nanoGPT.

    A group without parameters is left out: a rank may own none of a kind, and not every engine takes an empty group.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2]},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def configure(
    module: nn.Module,
    make_optimizer: Callable[..., Optimizer],
    make_scheduler: Callable[[Optimizer], LRScheduler] | None,
) -> OptimizerLRScheduler:
    """Return value of `configure_optimizers` for the parameters that the module has on this rank."""
    optimizer = make_optimizer(decay_groups(module.parameters()))
    if make_scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": "step"}}
