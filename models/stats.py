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
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.chaining import watch_calls
from models.plan import Chain, ParallelPlan


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What one sample brings to a module, or takes from it."""

    elements: int = 0  # of floating-point tensors
    other_bytes: int = 0  # of tensors in other formats
    narrow: bool = False  # whether autocast leaves it in the format of products; what meets a parameter is widened

    def __add__(self, other: "Passed") -> "Passed":
        return Passed(
            elements=self.elements + other.elements,
            other_bytes=self.other_bytes + other.other_bytes,
            narrow=self.narrow and other.narrow,
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module that holds parameters itself, not in a child, or that has a style in `ParallelPlan.tensor`."""

    name: str  # FQN in the net
    style: str | None
    parameters: tuple[int, ...]  # positions in `ModelStats.shapes`
    takes: Passed
    gives: Passed


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A module of the plan's chain; its parts are in the order of `named_modules()`."""

    parts: tuple[Part, ...]
    takes: Passed
    gives: Passed
    forward_flops: int  # per sample

    @property
    def parameters(self) -> tuple[int, ...]:
        """Positions in `ModelStats.shapes`, each once."""
        return tuple(dict.fromkeys(position for part in self.parts for position in part.parameters))


@dataclass(frozen=True, kw_only=True)
class ModelStats:
    """Counts of one model for batches of one shape of sample.

    A unit is a module of the plan's chain, by its FQN in the net; there is none in a module without a plan. A
    multiply-add is 2 FLOPs; only products of matrices and convolutions count.
    """

    parameters: int  # each once, a tied one too
    shapes: tuple[tuple[int, ...], ...]  # of each parameter, in the order of `module.parameters()`
    reused: tuple[int, ...]  # elements of parameters that stand in a further place of the net, once for each such place
    flops_per_sample: int  # forward and backward of `training_step`
    chain: Chain
    units: dict[str, Unit]  # in forward order
    between: tuple[int, ...]  # positions of the net's parameters that lie in no unit
    gap: str | None  # where the net's forward is not the chain of its units, in words; None where it is

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def parameters_by_unit(self) -> dict[str, int]:
        """Elements of each unit's parameters, a tied one in its first unit."""
        sizes, counted = self.sizes, set[int]()
        by_unit = {}
        for name, unit in self.units.items():
            by_unit[name] = sum(sizes[position] for position in unit.parameters if position not in counted)
            counted |= set(unit.parameters)
        return by_unit

    @property
    def forward_flops_by_unit(self) -> dict[str, int]:
        return {name: unit.forward_flops for name, unit in self.units.items()}

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the parameters in each optimizer group: matrices and vectors apart, as in `models.optimize`.

        All are taken to be trained; a module's own `configure_optimizers` may group, or leave out, otherwise.
        """
        matrices = tuple(i for i, shape in enumerate(self.shapes) if len(shape) >= 2)
        vectors = tuple(i for i, shape in enumerate(self.shapes) if len(shape) < 2)
        return tuple(group for group in (matrices, vectors) if group)


def call_step(module: LightningModule, batch: Any) -> Any:
    """What the training step returns for the first batch, whose number it need not take."""
    takes_number = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, 0) if takes_number else module.training_step(batch)


def measure(module: LightningModule, sample: Any) -> ModelStats:
    """Count one `training_step` and its backward, run on the meta device: nothing is computed or allocated.

    `module` has its net on meta (`configure_model` has run) and no Trainer yet; `sample` is a batch of one sample, on
    any device. These are model FLOPs (Chowdhery et al. 2022, appendix B): what activation checkpointing computes again
    is not counted, attention is counted in full, causal or not. Gradients of `module` are left as None.
    """
    plan = getattr(module, "plan", ParallelPlan())
    net: nn.Module = module.get_submodule(plan.net) if has_net(module, plan) else module
    chain = plan.expand(name for name, _ in net.named_modules())
    units = {name: net.get_submodule(name) for name in chain.modules}
    positions = {parameter: position for position, parameter in enumerate(module.parameters())}
    parts = {unit: _parts(net.get_submodule(unit), unit, plan) for unit in chain.modules}
    watched = units | {name: part for by_name in parts.values() for name, part in by_name.items()}
    # Written out, attention is plain products, which every torch counts alike; fused kernels are not all known to it.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with (
            without_trainer(),
            _counted_by_unit(units, counter) as forward_flops,
            _watched(watched) as passed,
            watch_calls(net, units) as calls,
        ):
            output = call_step(module, move_data_to_device(sample, torch.device("meta")))
        loss = output["loss"] if isinstance(output, Mapping) else output  # Lightning takes either
        with _Recomputed(counter) as recomputed:
            loss.backward()
    module.zero_grad(set_to_none=True)
    return ModelStats(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        shapes=tuple(tuple(parameter.shape) for parameter in module.parameters()),
        reused=_reused(module),
        flops_per_sample=counter.get_total_flops() - recomputed.flops,
        chain=chain,
        units={
            unit: Unit(
                parts=tuple(
                    Part(
                        name=name,
                        style=plan.style(name),
                        parameters=tuple(positions[parameter] for parameter in part.parameters(recurse=False)),
                        takes=passed[name][0],
                        gives=passed[name][1],
                    )
                    for name, part in parts[unit].items()
                ),
                takes=passed[unit][0],
                gives=passed[unit][1],
                forward_flops=forward_flops[unit],
            )
            for unit in chain.modules
        },
        between=_between(net, units, positions),
        gap=calls.gap(list(units)),
    )


def has_net(module: nn.Module, plan: ParallelPlan) -> bool:
    """Whether the plan's net is there: a module without a plan may call its net otherwise."""
    return plan.net in dict(module.named_modules())


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
def without_trainer() -> Iterator[None]:
    """A step may log: Lightning warns that there is no Trainer to log to, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`self.trainer` reference is not registered.*")
        yield


def _parts(unit: nn.Module, fqn: str, plan: ParallelPlan) -> dict[str, nn.Module]:
    """The modules in `unit` that become Parts, by their FQN in the net; `fqn` is the unit's own."""
    return {
        name: module
        for name, module in unit.named_modules(prefix=fqn)
        if plan.style(name) or list(module.parameters(recurse=False))
    }


@contextmanager
def _watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Passed, Passed]]]:
    """Yield a dict that fills with what each module takes and gives, in all its calls together."""
    passed = {name: (Passed(), Passed()) for name in modules}

    def watch(name: str, taken: Any, given: Any) -> None:
        now = _passed(taken), _passed(given)
        so_far = passed[name]
        called = so_far != (Passed(), Passed())
        passed[name] = (so_far[0] + now[0], so_far[1] + now[1]) if called else now

    handles = [
        module.register_forward_hook(lambda _, taken, given, name=name: watch(name, taken, given))
        for name, module in modules.items()
    ]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _passed(values: Any) -> Passed:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return Passed(
        elements=sum(tensor.numel() for tensor in floating),
        other_bytes=sum(tensor.nbytes for tensor in tensors if not tensor.is_floating_point()),
        narrow=all(map(_is_narrow, floating)),
    )


# What autocast computes in its own format, as autograd calls it; attention is written out here.
_PRODUCTS = {"AddmmBackward0", "MmBackward0", "BmmBackward0", "BaddbmmBackward0", "ConvolutionBackward0"}


def _is_narrow(tensor: Tensor) -> bool:
    """Whether a tensor comes of products alone: what other operators make of several formats is in the widest."""
    if tensor.grad_fn is None:
        return False
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            return False
        if node.name() not in _PRODUCTS and node not in seen:
            seen.add(node)
            nodes += [source for source, _ in node.next_functions if source is not None]
    return True


def _between(net: nn.Module, units: dict[str, nn.Module], positions: Mapping[nn.Parameter, int]) -> tuple[int, ...]:
    inside = {parameter for unit in units.values() for parameter in unit.parameters()}
    return tuple(positions[parameter] for parameter in net.parameters() if parameter not in inside)


def _reused(module: nn.Module) -> tuple[int, ...]:
    seen: set[nn.Parameter] = set()
    again = []
    for _, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in seen:
            again.append(parameter.numel())
        seen.add(parameter)
    return tuple(again)
