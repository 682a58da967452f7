"""FSDP2 on the units of a net: what is sharded together, and gradients that are reduced when a schedule says so.

What is private in torch, tested on 2.13: the state of an FSDPModule, for `let_go` and `gathered`, and for
`reduce_gradients`, which does what torch's own pipeline schedules do once all micro-batches have been through.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    root: nn.Module,
    units: Mapping[str, nn.Module],
    blocks: Sequence[str],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    keep_last: bool,
    reduce_dtype: torch.dtype,
    offload: bool,
) -> None:
    """Shard `root`: each block by itself, what comes before them together, and what comes after.

    `units` are its parts by name, in forward order. A parameter that stands in two places cannot be gathered with the
    one or the other: it belongs to the root, and stays gathered from forward to backward. keep_last: where backward
    follows at once, what forward gathers last stays for it. A parameter without dims, which torch refuses to shard,
    stays whole on every rank; its gradients are left to the caller to average, as those of parameters outside of root.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
        "reshard_after_forward": reshard_after_forward,
    }
    scalars = {parameter for parameter in root.parameters() if parameter.dim() == 0}
    if scalars:
        options["ignored_params"] = scalars
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    uses = Counter(parameter for _, parameter in root.named_parameters(remove_duplicate=False))
    alone = {
        name: unit
        for name, unit in units.items()
        if all(uses[parameter] == 1 for parameter in unit.parameters()) and list(unit.parameters())
    }
    groups = [before(units, blocks), *([name] for name in blocks), after(units, blocks)]
    held = [[alone[name] for name in group if name in alone] for group in groups]
    *others, last = [group for group in held if group] or [[]]
    for group in others:
        fully_shard(group, **options)
    kept = options | {"reshard_after_forward": False}
    if last:
        fully_shard(last, **kept if keep_last else options)
    fully_shard(root, **kept)


def before(units: Mapping[str, nn.Module], blocks: Sequence[str]) -> list[str]:
    names = list(units)
    first = next((position for position, name in enumerate(names) if name in blocks), len(names))
    return names[:first]


def after(units: Mapping[str, nn.Module], blocks: Sequence[str]) -> list[str]:
    return [name for name in units if name not in blocks and name not in before(units, blocks)]


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def held_by(module: nn.Module) -> dict[str, Any]:
    """What FSDP keeps of each sharded parameter that is trained, by FQN; before anything has been gathered."""
    names = {id(parameter): fqn for fqn, parameter in module.named_parameters() if parameter.requires_grad}
    return {
        names[id(held.sharded_param)]: held
        for part in sharded_parts(module)
        for group in part._get_fsdp_state()._fsdp_param_groups
        for held in group.fsdp_params
        if id(held.sharded_param) in names
    }


def gathered(held_by: Mapping[str, Any]) -> dict[str, Tensor]:
    """What autograd adds gradients to, by FQN: gathered parameters; there are none before the first forward."""
    return {fqn: held._unsharded_param for fqn, held in held_by.items() if hasattr(held, "_unsharded_param")}


def without_gradient(held_by: Mapping[str, Any]) -> list[str]:
    """FQNs of what has no gradient that waits to be reduced."""
    leaves = gathered(held_by)
    return [
        fqn
        for fqn, held in held_by.items()
        if fqn not in leaves or (leaves[fqn].grad is None and held.unsharded_accumulated_grad is None)
    ]


def let_go(part: FSDPModule) -> None:
    """Keep no more than this rank's shards, whatever is to follow; FSDPModule.reshard leaves what awaits a backward."""
    for group in part._get_fsdp_state()._fsdp_param_groups:
        group._to_sharded()


def hold(root: FSDPModule) -> None:
    """Parameters stay gathered, gradients whole and unreduced, until `reduce_gradients`."""
    root.set_is_last_backward(False)
    root.set_reshard_after_backward(False)
    root.set_requires_gradient_sync(False)


def reduce_gradients(root: FSDPModule) -> None:
    """Average the gradients over the data ranks, keep this rank's shards of them, and let go of gathered parameters."""
    root.set_is_last_backward(True)
    root.set_reshard_after_backward(True)
    root.set_requires_gradient_sync(True)
    state = root._get_fsdp_state()
    for part in state._state_ctx.all_states:
        for group in part._fsdp_param_groups:
            group.post_backward()
    state._root_post_backward_final_callback()
