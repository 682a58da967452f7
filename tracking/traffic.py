"""Bytes per collective, counted from c10d itself: whatever asks for a collective, it goes through c10d's operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Key(NamedTuple):
    """A collective and the global ranks of its process group, in the group's order."""

    collective: str
    ranks: tuple[int, ...]


class Count(NamedTuple):
    """How often this rank took part, and how many bytes were its payload; a coalesced collective is one call."""

    calls: int
    payload_bytes: int


class _Rule(NamedTuple):
    """What an operator is called, and which of its arguments holds the payload."""

    collective: str
    argument: int
    is_part: bool = False  # the argument is one rank's part of the payload, not the whole of it


# The operators of torch 2.11 to 2.15: torch/csrc/distributed/c10d/Ops.cpp and Functional.cpp.
_NATIVE = {
    "allreduce_": _Rule("all_reduce", 0),
    "allreduce_coalesced_": _Rule("all_reduce", 0),
    "allgather_": _Rule("all_gather", 0),
    "_allgather_base_": _Rule("all_gather", 0),
    "allgather_coalesced_": _Rule("all_gather", 0),
    "allgather_into_tensor_coalesced_": _Rule("all_gather", 0),
    "reduce_scatter_": _Rule("reduce_scatter", 1),
    "_reduce_scatter_base_": _Rule("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": _Rule("reduce_scatter", 1),
    "reduce_": _Rule("reduce", 0),
    "broadcast_": _Rule("broadcast", 0),
    "alltoall_": _Rule("all_to_all", 1),
    "alltoall_base_": _Rule("all_to_all", 1),
    # Only the root holds the list, and its parts are of one size.
    "gather_": _Rule("gather", 1, is_part=True),
    "scatter_": _Rule("scatter", 0, is_part=True),
    "send": _Rule("send", 0),
    "recv_": _Rule("recv", 0),
    "recv_any_source_": _Rule("recv", 0),
}
_FUNCTIONAL = {
    "all_reduce": _Rule("all_reduce", 0),
    "all_reduce_": _Rule("all_reduce", 0),
    "all_reduce_coalesced": _Rule("all_reduce", 0),
    "all_reduce_coalesced_": _Rule("all_reduce", 0),
    "all_gather_into_tensor": _Rule("all_gather", 0, is_part=True),
    "all_gather_into_tensor_out": _Rule("all_gather", 0, is_part=True),
    "all_gather_into_tensor_coalesced": _Rule("all_gather", 0, is_part=True),
    "reduce_scatter_tensor": _Rule("reduce_scatter", 0),
    "reduce_scatter_tensor_out": _Rule("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": _Rule("reduce_scatter", 0),
    "broadcast": _Rule("broadcast", 0),
    "broadcast_": _Rule("broadcast", 0),
    "all_to_all_single": _Rule("all_to_all", 0),
    "isend": _Rule("send", 0),
    "irecv": _Rule("recv", 0),
}
_RULES = {
    "c10d": _NATIVE,
    "_c10d_functional": _FUNCTIONAL,
    "_c10d_functional_autograd": _FUNCTIONAL,
    # DTensor's only collective that is an operator around c10d's, which a dispatch mode cannot see inside it.
    "_dtensor": {"shard_dim_alltoall": _Rule("all_to_all", 0)},
}
_BATCH_P2P = "batch_p2p_ops"  # one operator for many: str[] op_list, int[] peer_list, int[] tag_list, Tensor[] tensors
_MOVE_NOTHING = {"barrier", "monitored_barrier_", "wait_tensor", "check_for_nan", "_wrap_tensor_autograd"}
_GROUP_ARGUMENTS = {"process_group", "group_name"}


@final
class TrafficCounter(TorchDispatchMode):
    """Counts the collectives that this rank takes part in while the context is entered; `counts` has the result.

    It sees every call that reaches the `c10d` and `_c10d_functional` operators, whoever makes it: DDP's reducer, FSDP2,
    DTensor, DeepSpeed, `torch.distributed`, compiled graphs. The payload of one call, in bytes:

    - all_reduce, broadcast, reduce, send, recv: the tensor (of a sparse one, the indices and values it holds);
    - all_gather: the whole gathered output, all ranks' parts;
    - reduce_scatter: the whole input, all ranks' parts;
    - all_to_all: this rank's whole input, with the part that it keeps;
    - gather, scatter: the root's whole list, on every rank.

    Barriers and waits move nothing. An operator that is not known here counts under its own name (`c10d::name`) with
    all tensors among its arguments, so that it is seen in the result; so does one without a group, as that of no ranks.

    Backward counts too if it is called inside the context, also on CUDA, where it runs in autograd's own threads:
    each takes over the caller's dispatch modes (`at::ThreadLocalState`, kept in `GraphTask::thread_locals_`). Threads
    that Python starts do not. Nor is anything seen that does without c10d's operators (symmetric memory, NVSHMEM,
    DeepSpeed's shared-memory all-reduce), or that a custom operator does in its own kernel.

    Results do not change and no tensor is kept, but every operator passes through Python, which adds about 20 us (torch
    2.13, `add_` on CPU): steps that are counted are not steps to time. Entering it again goes on with the same counts.
    """

    # A higher-order operator, such as flex attention, would be refused otherwise.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[Key, Count] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code compiled: its collectives are still calls of these operators when it runs."""
        return True

    @property
    def counts(self) -> Mapping[Key, Count]:
        """What has been counted so far, in the order of first calls; does not change afterwards."""
        return MappingProxyType(dict(self._counts))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(_desugars(kind) for kind in types):
            # A mode goes before tensor subclasses; let them go first, or a DTensor's collectives would stay inside it.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if isinstance(func, OpOverload) and func.namespace in _RULES and FakeTensor not in types:
            self._count(func, args)
        return result

    def _count(self, func: OpOverload, args: tuple[Any, ...]) -> None:
        ranks = _group_ranks(func, args)
        for collective, payload_bytes in _payloads(func, args, len(ranks)):
            key = Key(collective, ranks)
            calls, total = self._counts.get(key, (0, 0))
            self._counts[key] = Count(calls + 1, total + payload_bytes)


def _desugars(kind: type) -> bool:
    """Whether the tensors of this class turn an operator on them into others, on what they hold."""
    # `Tensor.data` names nn.Parameter among its types, which dispatches nothing; and a FakeTensor, by which DTensor
    # infers shapes, relies on its own mode. It has no data to move.
    return kind is not FakeTensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]


def _group_ranks(func: OpOverload, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Global ranks of the operator's process group, in the group's order; none if it has no group (a wait, a check)."""
    for argument, value in zip(func._schema.arguments, args, strict=False):  # defaults are left out of args
        if argument.name in _GROUP_ARGUMENTS:
            return tuple(dist.get_process_group_ranks(_process_group(value)))
    return ()


def _process_group(value: Any) -> dist.ProcessGroup:
    """The group itself: functional operators take its name or, since torch 2.13, itself; the others a ScriptObject."""
    if isinstance(value, torch.ScriptObject):
        return dist.ProcessGroup.unbox(value)
    return value if isinstance(value, dist.ProcessGroup) else dist.distributed_c10d._resolve_process_group(value)


def _payloads(func: OpOverload, args: tuple[Any, ...], group_size: int) -> Iterator[tuple[str, int]]:
    """Each call in the operator, as its collective and its payload in bytes."""
    name = func._schema.name.partition("::")[2]
    rules = _RULES[func.namespace]
    if name in _MOVE_NOTHING:
        return
    if name == _BATCH_P2P:
        for direction, tensor in zip(args[0], args[3], strict=True):
            yield rules[direction].collective, _bytes([tensor])
    elif name in rules and group_size:
        rule = rules[name]
        yield rule.collective, _bytes([args[rule.argument]]) * (group_size if rule.is_part else 1)
    elif unknown := _bytes(args):
        yield f"{func.namespace}::{name}", unknown


def _bytes(values: Iterable[Any]) -> int:
    """Bytes of all tensors in `values`, lists and lists of lists of them included."""
    total = 0
    for value in values:
        if isinstance(value, list | tuple):
            total += _bytes(value)
        elif isinstance(value, Tensor) and value.layout is torch.sparse_coo:
            total += value._indices().nbytes + value._values().nbytes
        elif isinstance(value, Tensor):
            total += value.nbytes
    return total
