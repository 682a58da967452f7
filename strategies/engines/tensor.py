"""Tensor parallelism: the styles of a plan as torch's parallel styles on the modules of a unit."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.functional import embedding
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from models.plan import Chain, ParallelPlan
from strategies.engines.draws import generators_of, seed_of
from strategies.engines.shards import local

TIME = 1  # the dim of activations [batch, time, ...] that sequence parallelism splits


class Whole(ParallelStyle):
    """Parameters on every rank; what comes out feeds split modules, which each return a part of its gradient.

    It is a DTensor, so that those parts are added up before they are summed over the ranks, once. With `sequence` the
    module sees a part of the sequence, and the parts are gathered behind it.
    """

    def __init__(self, *, sequence: bool) -> None:
        super().__init__()
        self.placements = [Shard(TIME) if sequence else Replicate()]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def replicate(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(part.named_parameters(recurse=False)):
                whole = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
                part.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))

        def take(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            x, *others = inputs
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, self.placements, run_check=False)
            return (x, *others)

        def give(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> DTensor:
            return output.redistribute(placements=[Replicate()])

        return distribute_module(module, device_mesh, replicate, take, give)  # type: ignore[arg-type]


class Rows(ParallelStyle):
    """An embedding whose rows lie on different ranks: each looks up its own, zeros elsewhere, and all add up.

    torch's RowwiseParallel does the same forward, but gives every rank the gradient of all rows (2.13).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        padding = cast(int | None, module.padding_idx)
        weight = distribute_tensor(module.get_parameter("weight"), device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))

        def look_up(tokens: Tensor) -> Tensor:
            rows = cast(DTensor, module.weight).to_local()
            first = device_mesh.get_local_rank() * len(rows)
            own = tokens - first
            inside = (own >= 0) & (own < len(rows))
            untrained = padding - first if padding is not None and 0 <= padding - first < len(rows) else None
            found = embedding(own.where(inside, 0), rows, untrained) * inside.unsqueeze(-1)
            return DTensor.from_local(found, device_mesh, [Partial()], run_check=False).full_tensor()

        module.forward = look_up
        return module


def parallel_style(style: str, *, sequence: bool, loss_parallel: bool) -> ParallelStyle:
    """torch's counterpart of a name in TENSOR_STYLES."""
    match style:
        case "colwise":
            return ColwiseParallel()
        case "rowwise":
            return RowwiseParallel(output_layouts=Shard(TIME) if sequence else Replicate())
        case "embedding":
            return Rows()
        case "vocabulary":
            if loss_parallel:
                return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            return ColwiseParallel(output_layouts=Replicate())
        case "sequence":
            return Whole(sequence=sequence)
        case "whole":
            return Whole(sequence=False)
    raise AssertionError(style)


class SplitDraws:
    """What ranks of the tensor axis draw for a part of an activation that each has: other numbers than its neighbours.

    Where they all have the whole, they draw alike, by the state that the device's generator is in; from where it is
    split until it is whole again, each draws by a seed that follows from that state and its rank (as Megatron-LM does:
    Shoeybi et al. 2019, section 3). So a forward that is run again for its gradients draws the same.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.generator = rank, generators_of(device)[-1]
        self.state: Tensor | None = None  # to go on with behind the split part

    def enter(self, module: nn.Module, *_: Any) -> None:
        if self.state is not None or not module.training:
            return
        key = torch.randint(2**31, (), generator=torch.default_generator, device="cpu")
        self.state = self.generator.get_state()
        self.generator.manual_seed(seed_of(int(key), self.rank))

    def leave(self, *_: Any) -> None:
        if self.state is not None:
            self.generator.set_state(self.state)
            self.state = None


def drops(unit: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 for part in unit.modules())


def split_draws(unit: nn.Module, fqn: str, plan: ParallelPlan, draws: SplitDraws, *, sequence: bool) -> None:
    """Have what a unit drops from split activations drawn by each rank for itself."""
    if sequence:  # all of it lies between norms that each see a part of the sequence
        unit.register_forward_pre_hook(draws.enter)
    for name, module in unit.named_modules(prefix=fqn):
        if not sequence and plan.style(name) == "colwise":
            module.register_forward_hook(draws.enter)
        if not sequence and plan.style(name) == "rowwise":
            module.register_forward_pre_hook(draws.leave)
    unit.register_forward_hook(draws.leave, always_call=True)


def split_unit(
    unit: nn.Module, fqn: str, plan: ParallelPlan, mesh: DeviceMesh, *, sequence: bool, loss_parallel: bool
) -> None:
    """Split the modules of one unit, called `fqn` in its net, over the ranks of the tensor axis.

    Every rank holds the unit whole beforehand; nothing is communicated. `sequence`: whether the unit lies where
    activations are split along the sequence.
    """
    for name, module in list(unit.named_modules(prefix=fqn)):
        style = plan.style(name)
        if style is None:
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda _, inputs: tree_map(whole, inputs))
            continue
        trained = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
        chosen = parallel_style(style, sequence=sequence, loss_parallel=loss_parallel)
        parallelize_module(module, mesh, chosen, src_data_rank=None)
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(trained[key])


SPLIT_DIM = {"colwise": 0, "rowwise": 1, "embedding": 0, "vocabulary": 0}  # of the weight


def check_split(net: nn.Module, plan: ParallelPlan, ranks: int) -> None:
    """ValueError naming a module that cannot be split over `ranks` as the plan says."""
    for unit in plan.expand(name for name, _ in net.named_modules()).modules:
        for name, module in net.get_submodule(unit).named_modules(prefix=unit):
            style = plan.style(name)
            if style == "embedding":
                check_embedding(module, name)
            elif style in SPLIT_DIM:
                check_linear(module, name, style)
            if style in SPLIT_DIM:
                check_divides(module, name, style, ranks)


def check_divides(module: nn.Module, name: str, style: str, ranks: int) -> None:
    if (size := module.get_parameter("weight").shape[SPLIT_DIM[style]]) % ranks:
        raise ValueError(
            f"strategy.mesh.tensor={ranks} does not divide the {size} {'rows' if style != 'rowwise' else 'columns'} of "
            f"{name}.weight, which plan.tensor calls {style}; choose a divisor of {size}."
        )


def check_linear(module: nn.Module, name: str, style: str) -> None:
    """ValueError if a product with a matrix [outputs, inputs], which is what torch splits, is not all of the module."""
    kind = type(module)
    if kind.forward is nn.Linear.forward and not is_parametrized(module):
        return
    inner = next((f"{name}.{child}" for child, part in module.named_modules() if type(part) is nn.Linear), None)
    fix = f"give the style to {inner} inside of it" if inner else "make it an nn.Linear"
    if is_parametrized(module):
        raise ValueError(
            f"plan.tensor: {name} is called {style}, but its weight is computed anew in every forward (a "
            f"parametrization), which no rank can do for its part alone; leave out the style."
        )
    raise ValueError(
        f"plan.tensor: {name} is called {style}, but is a {kind.__name__} and no nn.Linear, which is all that can be "
        f"split so; {fix}, or leave out the style."
    )


def check_embedding(module: nn.Module, name: str) -> None:
    """ValueError if a look-up of rows, all that `Rows` does, is not all that the module does."""
    kind = type(module)
    if kind.forward is not nn.Embedding.forward:
        raise ValueError(
            f"plan.tensor: {name} is called embedding, but {kind.__name__}.forward is not nn.Embedding's, and its rows "
            f"would be looked up without it; move what it adds behind the embedding, or leave out the style."
        )
    options = {key: getattr(module, key) for key in ("max_norm", "scale_grad_by_freq", "sparse")}
    used = next((f"{key}={value}" for key, value in options.items() if value not in (None, False)), None)
    if used:
        raise ValueError(
            f"plan.tensor: {name} is called embedding, but has {used}, which rows on several ranks do not follow; "
            f"leave out {used.partition('=')[0]}, or the style."
        )


def whole(value: Any) -> Any:
    """A plain tensor with all of a DTensor's values, on every rank; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def covers_blocks(net: nn.Module, plan: ParallelPlan, chain: Chain) -> bool:
    """Whether activations may be split along the sequence: every module with parameters in the blocks has a style.

    One that has none would take its part of the sequence for the whole.
    """
    inside = [
        plan.style(name)
        for block in chain.blocks
        for name, module in net.get_submodule(block).named_modules(prefix=block)
        if list(module.parameters(recurse=False))
    ]
    return "sequence" in inside and not {None, "whole"} & set(inside)


def sequence_units(plan: ParallelPlan, chain: Chain) -> tuple[str, ...]:
    """The units that take a part of the sequence: the blocks, and the head's norms of style `sequence` behind them."""
    norms = itertools.takewhile(lambda unit: plan.style(unit) == "sequence", chain.head)
    return (*chain.blocks, *norms)


def bound_sequence(units: Mapping[str, nn.Module], inside: Sequence[str], plan: ParallelPlan, mesh: DeviceMesh) -> None:
    """Split activations before the first of the units `inside`, and gather them behind the last.

    `units` are those that this rank has. A norm of style `sequence` gathers by itself.
    """
    if inside[0] in units:
        units[inside[0]].register_forward_pre_hook(lambda _, inputs: (split_sequence(inputs[0], mesh), *inputs[1:]))
    if inside[-1] in units and plan.style(inside[-1]) != "sequence":
        units[inside[-1]].register_forward_hook(lambda _, __, output: gather_sequence(output, mesh))


def split_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[batch, time, ...] -> this rank's [batch, time / ranks, ...]; backward gathers."""
    if x.shape[TIME] % mesh.size():
        raise ValueError(
            f"strategy.sequence_parallel=true: strategy.mesh.tensor={mesh.size()} does not divide a sequence of "
            f"{x.shape[TIME]}; choose a length that it divides (data.sequence_length), or sequence_parallel=false."
        )
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(TIME)]).to_local()


def gather_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The inverse: backward takes this rank's part of a gradient that all ranks have."""
    return DTensor.from_local(x, mesh, [Shard(TIME)], run_check=False).full_tensor()


def plain_tree(output: Any) -> Any:
    """What a net gives to a step that knows nothing of DTensors, nor of FSDP, whose hook sits on this very tensor.

    A view would lose that hook, and gradients with it, if the step changed it in place.
    """

    def plain(value: Any) -> Any:
        value = whole(value)
        return value.clone() if isinstance(value, Tensor) and value._is_view() else value

    return tree_map(plain, output)


def sum_partial_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up gradients of which each tensor rank has computed a part: those of norms along a split sequence."""
    partial = [parameter for parameter in parameters if has_parts(parameter.grad)]
    if not partial:
        return
    gradients = [cast(DTensor, parameter.grad) for parameter in partial]
    flat = torch.cat([gradient.to_local().reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=gradients[0].device_mesh.get_group())
    for parameter, gradient, part in zip(
        partial, gradients, flat.split([gradient.to_local().numel() for gradient in gradients]), strict=True
    ):
        summed = part.view(gradient.shape)
        parameter.grad = DTensor.from_local(summed, gradient.device_mesh, [Replicate()], run_check=False)


def has_parts(gradient: Tensor | None) -> bool:
    return isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements)


# By what tensor ranks may differ, relative to a gradient's norm: rounding, in formats of 24 bits and more, and in those
# of 8 or 11. Where each has its own part of a gradient they differ by about as much as the gradient itself.
TOLERANCE, COARSE_TOLERANCE = 1e-4, 5e-2
CHUNK = 2**22  # elements that are compared at once


def check_alike(parameters: Iterable[tuple[str, nn.Parameter]], mesh: DeviceMesh, compute: str, strategy: str) -> None:
    """ValueError on every rank, of other stages too, if copies of a parameter get different gradients.

    They would drift apart, each trained by its own part of the activations. Collective over the world. `compute`: the
    format of forward and backward.
    """
    tolerance = TOLERANCE if compute in ("float32", "float64") else COARSE_TOLERANCE
    copies = [(fqn, parameter) for fqn, parameter in parameters if parameter.requires_grad and not is_split(parameter)]
    # All ranks of the group find the same, so that all stop at the same parameter.
    own = next((fqn for fqn, copy in copies if relative_difference(copy, mesh.get_group()) > tolerance), None)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    first = next((fqn for fqn in found if fqn), None)
    if first:
        raise ValueError(
            f"strategy={strategy}: each tensor rank has a whole copy of parameter {first}, but a gradient of its own "
            f"for it, since what reaches it is split, or drawn at random; give its module a style in plan.tensor, or "
            f"leave the modules of its block whole."
        )


def is_split(parameter: nn.Parameter) -> bool:
    """Whether tensor ranks have different parts of it."""
    if not isinstance(parameter, DTensor) or "tensor" not in (names := parameter.device_mesh.mesh_dim_names or ()):
        return False
    return not parameter.placements[names.index("tensor")].is_replicate()


def relative_difference(parameter: nn.Parameter, group: dist.ProcessGroup) -> float:
    """How far the ranks' gradients lie apart at most, relative to their size; no gradient counts as zeros."""
    gradient = local(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
    apart = torch.zeros(2, device=gradient.device)  # squares: of the differences, of the gradients
    for chunk in gradient.to(torch.promote_types(gradient.dtype, torch.float32)).split(CHUNK):
        highest, lowest = both = torch.stack([chunk, -chunk])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        apart += torch.stack([(highest + lowest).square().sum(), torch.maximum(highest, lowest).square().sum()])
    difference, size = apart.sqrt().tolist()
    return difference / size if size else 0.0
