"""Bytes and times of collectives, told by c10d itself: whoever asks for one, it goes through c10d's operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


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
_WAIT = "wait_tensor"
_POINT_TO_POINT = {"send", "recv_"}
CALLBACKS_S = 1.0


@dataclass
class Call:
    """One call of a collective by this rank, in the marks of the clock that it was timed with.

    A coalesced collective is one call. An operator that is not known here is a collective of its own name
    (`c10d::name`), so that it is seen in the result; so is one without a group, of no ranks.
    """

    collective: str
    group: str  # the process group's name, which all its ranks call it by
    ranks: tuple[int, ...]  # global ones, in the group's order
    payload_bytes: int
    called: Any
    returned: Any
    done: Any = None  # when the call's work was over; None if that was not seen
    waited_since: Any = None  # from when on this rank waited for it, if its end was seen by that alone
    peer: tuple[int, int, int] | None = None  # of a send or receive: who sends, who receives (in the group), the tag


class Wait(NamedTuple):
    """A stretch in which the thread, on CUDA the stream, stood still until a collective was over."""

    begin: Any
    end: Any


@final
class CollectiveTimer(TorchDispatchMode):
    """Notes the collectives that this rank takes part in, and its waits for them, while the context is entered.

    It sees every call that reaches the `c10d` and `_c10d_functional` operators, whoever makes it: DDP's reducer, FSDP2,
    DTensor, DeepSpeed, `torch.distributed`, compiled graphs. Barriers move nothing. Backward is seen too if it is
    called inside the context, also on CUDA, where it runs in autograd's own threads: each takes over the caller's
    dispatch modes (`at::ThreadLocalState`, kept in `GraphTask::thread_locals_`). Threads that Python starts are not.
    Nor is anything seen that does without c10d's operators (symmetric memory, NVSHMEM, DeepSpeed's shared-memory
    all-reduce), or that a custom operator does in its own kernel.

    A call is done when the future of its work says so, or, where it has none, when this rank has waited for it. Waits
    are seen where Python asks for them: `Work.wait`, which torch.distributed and DeepSpeed call, and `wait_tensor`.
    Those inside of C++ are not; but DDP's reducer waits behind a backward's last collective, so `unwaited` tells when.

    Results do not change, and no tensor is kept once it has been waited for, but every operator passes through Python,
    which adds about 20 us (torch 2.13, `add_` on CPU). Entered again, it adds to the same calls.

    mark: reads the clock; on CUDA it records an event, which is passed when the stream comes to it.
    """

    # A higher-order operator, such as flex attention, would be refused otherwise.
    supports_higher_order_operators = True

    def __init__(self, mark: Callable[[], Any]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.waits: list[Wait] = []
        self._mark = mark
        # By works that nobody has waited for; keeps their Python objects, by which a wait is told apart.
        self._works: dict[dist.Work, Call] = {}
        self._futures: dict[int, Call] = {}  # of functional collectives, by the address of their result
        self._waited: set[int] = set()  # ids of calls
        self._told: set[int] = set()  # ids of calls whose end is told by their work's future

    def __enter__(self) -> Self:
        self._wait = dist.Work.wait
        timer = self

        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            begin = timer._mark()
            result = timer._wait(work, *args, **kwargs)
            timer._waited_for(timer._works.pop(work, None), begin)
            return result

        dist.Work.wait = wait  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        dist.Work.wait = self._wait  # type: ignore[method-assign]
        super().__exit__(*failure)
        self._let_callbacks_end()

    def _let_callbacks_end(self) -> None:
        """Wait until the ends of works that are over have been noted.

        A future wakes who waits for it (DDP's reducer) before it calls back, and a callback has to get the GIL first.
        """
        give_up = time.monotonic() + CALLBACKS_S
        for work, call in self._works.items():
            # Not `work.is_completed()`, which under gloo is false until the callbacks have been.
            while call.done is None and id(call) in self._told and work.get_future().done():
                if time.monotonic() > give_up:
                    return
                time.sleep(0.001)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code compiled: its collectives are still calls of these operators when it runs."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(desugars(kind) for kind in types):
            # A mode goes before tensor subclasses; let them go first, or a DTensor's collectives would stay inside it.
            return NotImplemented
        if isinstance(func, OpOverload) and func.namespace in _RULES and FakeTensor not in types:
            return self._noted(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _noted(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        begin = self._mark()
        result = func(*args, **kwargs)
        returned = self._mark()
        if name == _WAIT:
            self._waited_for(self._futures.pop(_address(args[0]), None), begin)
            return result
        ranks, group = _group(func, args)
        for collective, payload_bytes in _payloads(func, args, len(ranks)):
            call = Call(collective, group, ranks, payload_bytes, begin, returned)
            self.calls.append(call)
            if name in _POINT_TO_POINT:
                call.peer = _peer(name, args)
            self._follow(call, func, result)
        return result

    def unwaited(self, first: int, last: int) -> Sequence[Call]:
        """Those of the calls number `first` to `last` (excluded) that Python has not waited for."""
        return [call for call in self.calls[first:last] if id(call) not in self._waited]

    def _waited_for(self, call: Call | None, begin: Any) -> None:
        end = self._mark()
        self.waits.append(Wait(begin, end))
        if call is not None:
            self._waited.add(id(call))
            if call.done is None:
                call.waited_since, call.done = begin, end

    def _follow(self, call: Call, func: OpOverload, result: Any) -> None:
        """Have the end of a call noted."""
        if func.namespace != "c10d":
            for tensor in result if isinstance(result, list | tuple) else [result]:
                if isinstance(tensor, Tensor):
                    self._futures[_address(tensor)] = call
            return
        last = result[-1] if isinstance(result, list | tuple) else result
        if not isinstance(last, torch.ScriptObject):
            return
        work = dist.Work.unbox(last)
        self._works[work] = call
        with suppress(RuntimeError):  # gloo has no futures of sends, receives, and collectives on one flat tensor
            work.get_future().add_done_callback(lambda _: self._end(call))
            self._told.add(id(call))

    def _end(self, call: Call) -> None:
        if call.done is None:
            call.done = self._mark()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _peer(name: str, args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Sender, receiver and tag of c10d's `send` and `recv_`, whose arguments are tensors, group, peer, tag."""
    here, there, tag = dist.get_rank(_process_group(args[1])), int(args[2]), int(args[3])
    return (here, there, tag) if name == "send" else (there, here, tag)


def desugars(kind: type) -> bool:
    """Whether the tensors of this class turn an operator on them into others, on what they hold."""
    # `Tensor.data` names nn.Parameter among its types, which dispatches nothing; and a FakeTensor, by which DTensor
    # infers shapes, relies on its own mode. It has no data to move.
    return kind is not FakeTensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]


def _group(func: OpOverload, args: tuple[Any, ...]) -> tuple[tuple[int, ...], str]:
    """Global ranks of the operator's process group, in the group's order, and its name.

    None and "" if it has no group (a wait, a check).
    """
    for argument, value in zip(func._schema.arguments, args, strict=False):  # defaults are left out of args
        if argument.name in _GROUP_ARGUMENTS:
            group = _process_group(value)
            return tuple(dist.get_process_group_ranks(group)), group.group_name
    return (), ""


def _process_group(value: Any) -> dist.ProcessGroup:
    """The group itself: functional operators take its name or, since torch 2.13, itself; the others a ScriptObject."""
    if isinstance(value, torch.ScriptObject):
        return dist.ProcessGroup.unbox(value)
    return value if isinstance(value, dist.ProcessGroup) else dist.distributed_c10d._resolve_process_group(value)


def _payloads(func: OpOverload, args: tuple[Any, ...], group_size: int) -> Iterator[tuple[str, int]]:
    """Each call in the operator, as its collective and its payload in bytes.

    - all_reduce, broadcast, reduce, send, recv: the tensor (of a sparse one, the indices and values it holds);
    - all_gather: the whole gathered output, all ranks' parts;
    - reduce_scatter: the whole input, all ranks' parts;
    - all_to_all: this rank's whole input, with the part that it keeps;
    - gather, scatter: the root's whole list, on every rank;
    - an operator that is not known here: all tensors among its arguments.
    """
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
