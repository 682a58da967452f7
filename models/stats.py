"""ModelStats: how big a model is and what a sample costs, from its net on the meta device."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.plan import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class ModelStats:
    """Counts of one model for batches of one shape of sample.

    A unit is a module of the plan's chain, by its FQN in the net; the dicts are in forward order, and empty for a
    module without a plan. A multiply-add is 2 FLOPs; only products of matrices and convolutions count.
    """

    parameters: int  # each once, a tied one too
    shapes: tuple[tuple[int, ...], ...]  # of each parameter, in the order of `module.parameters()`
    reused: tuple[int, ...]  # elements of parameters that stand in a further place of the net, once for each such place
    parameters_by_unit: dict[str, int]  # a tied one in its first unit
    flops_per_sample: int  # forward and backward of `training_step`
    forward_flops_by_unit: dict[str, int]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the parameters in each optimizer group: matrices and vectors apart, as in `models.optimize`.

        All are taken to be trained; a module's own `configure_optimizers` may group, or leave out, otherwise.
        """
        matrices = tuple(i for i, shape in enumerate(self.shapes) if len(shape) >= 2)
        vectors = tuple(i for i, shape in enumerate(self.shapes) if len(shape) < 2)
        return tuple(group for group in (matrices, vectors) if group)


def measure(module: LightningModule, sample: Any) -> ModelStats:
    """Count one `training_step` and its backward, run on the meta device: nothing is computed or allocated.

    `module` has its net on meta (`configure_model` has run) and no Trainer yet; `sample` is a batch of one sample, on
    any device. These are model FLOPs (Chowdhery et al. 2022, appendix B): what activation checkpointing computes again
    is not counted, attention is counted in full, causal or not. Gradients of `module` are left as None.
    """
    plan = getattr(module, "plan", ParallelPlan())
    net: nn.Module = getattr(module, plan.net, module)
    chain = plan.expand(name for name, _ in net.named_modules())
    units = {name: net.get_submodule(name) for name in chain.modules}
    # Written out, attention is plain products, which every torch counts alike; fused kernels are not all known to it.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with _without_trainer(), _counted_by_unit(units, counter) as forward_flops:
            output: Any = module.training_step(move_data_to_device(sample, torch.device("meta")), 0)
        loss = output["loss"] if isinstance(output, Mapping) else output  # Lightning takes either
        with _Recomputed(counter) as recomputed:
            loss.backward()
    module.zero_grad(set_to_none=True)
    return ModelStats(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        shapes=tuple(tuple(parameter.shape) for parameter in module.parameters()),
        reused=_reused(module),
        parameters_by_unit=_parameters_by_unit(units),
        flops_per_sample=counter.get_total_flops() - recomputed.flops,
        forward_flops_by_unit=forward_flops,
    )


class _Recomputed(TorchDispatchMode):
    """Counts the FLOPs of forwards that run again inside a backward: autograd enables gradients only for those."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            self.flops += self.counter.get_total_flops() - before
        return result


@contextmanager
def _counted_by_unit(units: dict[str, nn.Module], counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Yield a dict that fills with the FLOPs of each unit's forward."""
    flops = dict.fromkeys(units, 0)

    def add(name: str, sign: int) -> None:
        flops[name] += sign * counter.get_total_flops()

    handles = []
    for name, unit in units.items():
        handles.append(unit.register_forward_pre_hook(lambda *_, name=name: add(name, -1)))
        handles.append(unit.register_forward_hook(lambda *_, name=name: add(name, +1)))
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_trainer() -> Iterator[None]:
    """A step may log: Lightning warns that there is no Trainer to log to, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`self.trainer` reference is not registered.*")
        yield


def _parameters_by_unit(units: dict[str, nn.Module]) -> dict[str, int]:
    counted: set[nn.Parameter] = set()
    sizes = {}
    for name, unit in units.items():
        new = set(unit.parameters()) - counted
        sizes[name] = sum(parameter.numel() for parameter in new)
        counted |= new
    return sizes


def _reused(module: nn.Module) -> tuple[int, ...]:
    seen: set[nn.Parameter] = set()
    again = []
    for _, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in seen:
            again.append(parameter.numel())
        seen.add(parameter)
    return tuple(again)
