"""Memory of one rank by category, counted from the tensors that its engine holds while one step is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from strategies.engines.deepspeed import ZeroEngine
from strategies.engines.grid import GridEngine
from strategies.engines.sharding import sharded_parts
from strategies.engines.shards import local
from tracking.record import Memory
from tracking.traffic import desugars

Tensors = Iterable[Tensor | None]

# Operators around which communication buffers come and go.
WATCHED = {"c10d", "_c10d_functional", "fsdp"}
# FSDP2's, which makes what is gathered; the group has it only once the collective has been called.
GATHERS = "fsdp::all_gather_copy_in"


class Books(Protocol):
    """What an engine holds on one rank, by category; None stands for what is not there now.

    fresh: parameters whose gradients are held as autograd delivers them, until the engine moves them elsewhere.
    """

    @property
    def fresh(self) -> Iterable[Tensor]: ...

    def parameters(self) -> Tensors: ...

    def gradients(self) -> Tensors: ...

    def optimizer(self) -> Tensors: ...

    def buffers(self) -> Tensors: ...


@final
class WholeBooks:
    """Of an engine that steps the module's own parameters, or masters that it is told to step."""

    fresh = ()  # they are added to gradients that are there, or copied into DDP's buckets, at once

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.module, self.optimizers = module, optimizers

    def parameters(self) -> Tensors:
        return self.module.parameters()

    def gradients(self) -> Tensors:
        yield from (parameter.grad for parameter in self.module.parameters())
        for optimizer in self.optimizers:
            yield from (parameter.grad for parameter in stepped_by(optimizer))

    def optimizer(self) -> Tensors:
        for optimizer in self.optimizers:
            yield from (*stepped_by(optimizer), *states_of(optimizer))

    def buffers(self) -> Tensors:
        return ()  # gradients are views of DDP's buckets


@final
class ZeroBooks:
    """Of DeepSpeed's optimizer, whose tensors are private to it; tested on 0.19.8."""

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self.zero, self.stage = engine.optimizer, engine.zero_optimization_stage()
        self.all: Sequence[Any] = list(module.parameters())
        self.fresh = self.all

    def masters(self) -> Sequence[Tensor]:
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def parameters(self) -> Tensors:
        if self.stage < 3:
            return self.all
        return [parameter.ds_tensor for parameter in self.all] + [p.data for p in self.all if p.ds_persist]

    def gradients(self) -> Tensors:
        yield from (parameter.grad for parameter in self.all)
        yield from (master.grad for master in self.masters())
        if self.stage == 3:
            yield self.zero.grad_partitions_flat_buffer
            return
        yield self.zero.grads_in_partition
        for kept in (self.zero.all_grad_tensors, self.zero.averaged_gradients):
            for tensors in kept.values():
                yield from tensors or []

    def optimizer(self) -> Tensors:
        return [*self.masters(), *states_of(self.zero.optimizer)]

    def buffers(self) -> Tensors:
        for bucket in self.zero.ipg_buckets.values():
            yield from [bucket.buffer] if self.stage == 3 else bucket.buffer
        if self.stage == 3:
            yield from (parameter.data for parameter in self.all if not parameter.ds_persist)


@final
class GridBooks:
    """Of a grid's rank: FSDP2's parameter groups, which are private to torch (tested on 2.13), and what they leave."""

    def __init__(self, module: nn.Module, engine: GridEngine) -> None:
        self.module, self.stepping = module, engine.stepping
        self.adds_up = engine.steps is not None  # gradients of micro-batches, at once, before any is reduced
        roots = engine.steps.sharded_roots if engine.steps else []
        parts = [*sharded_parts(module), *roots]
        self.groups: list[Any] = list(
            dict.fromkeys(group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups)
        )
        self.sharded: list[Any] = [parameter for group in self.groups for parameter in group.fsdp_params]

    @property
    def gathered(self) -> list[Tensor]:
        return [p._unsharded_param for p in self.sharded if hasattr(p, "_unsharded_param")]  # since its first gather

    @property
    def fresh(self) -> list[Tensor]:
        return [] if self.adds_up else self.gathered

    def parameters(self) -> Tensors:
        gathered = set(map(id, self.gathered))
        shards = {id(parameter.sharded_param) for parameter in self.sharded}
        yield from (parameter._sharded_param_data for parameter in self.sharded)
        yield from (p for p in self.module.parameters() if id(p) not in gathered and id(p) not in shards)

    def gradients(self) -> Tensors:
        yield from (parameter.grad for parameter in self.module.parameters())
        yield from (parameter.grad for parameter in stepped_by(self.stepping))
        yield from (group._partial_reduce_output for group in self.groups)
        for parameter in self.sharded:
            yield from (parameter.sharded_param.grad, parameter.unsharded_accumulated_grad)
        yield from (parameter.grad for parameter in self.gathered)

    def optimizer(self) -> Tensors:
        return [*stepped_by(self.stepping), *states_of(self.stepping)]

    def buffers(self) -> Tensors:
        yield from (tensor for parameter in self.sharded for tensor in parameter.all_gather_outputs)
        for group in self.groups:
            context = group.comm_ctx  # which has nothing before the first forward, in which ranks talk already
            state = getattr(context, "all_gather_state", None)
            arriving = state and state.all_gather_result
            yield from (result.all_gather_output for result in (group._all_gather_result, arriving) if result)
            yield from (state.reduce_scatter_input for state in getattr(context, "reduce_scatter_states", ()))


def books_of(engine: Strategy, module: nn.Module) -> Books:
    if isinstance(engine, ZeroEngine):
        return ZeroBooks(module, engine.deepspeed_engine)
    if isinstance(engine, GridEngine):
        return GridBooks(module, engine)
    return WholeBooks(module, engine.optimizers)


def stepped_by(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def states_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Moments and the like; numbers such as Adam's count of steps are left out."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address of what these tensors hold on this rank, each storage once; to be called without gradients."""
    parts = [local(tensor) for tensor in tensors if tensor is not None]
    held = [part.untyped_storage() for part in parts if part.numel() and not part.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


@final
class MemoryCensus(TorchDispatchMode):
    """Counts, while it is entered, what this rank holds of each category at its peak.

    Gradients, buffers and activations are looked at where they come and go: before each module's forward, around each
    gradient and each collective, and before the optimizer steps. Activations are the storages that operators outside
    of a backward, or in a forward that runs again inside of one, have made and that are still alive; those inside of
    compiled code are not seen. To look takes time: a step that is counted is not one to time.

    is_reducing: whether gradients are being reduced outside of a backward, where what is sent is a copy of them.
    """

    # A higher-order operator, such as flex attention, would be refused otherwise.
    supports_higher_order_operators = True

    def __init__(self, engine: Strategy, module: pl.LightningModule, stepping: Optimizer) -> None:
        super().__init__()
        self.books, self.module, self.stepping = books_of(engine, module), module, stepping
        self.peaks = {"gradients": 0, "buffers": 0, "activations": 0}
        self.is_reducing = False
        self._made: Any = WeakIdKeyDictionary()  # storages that forwards have made
        self._gathered: Any = WeakIdKeyDictionary()  # and those that FSDP2 has, of which forwards have views
        self._handles: list[Any] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self) -> Self:
        for part in self.module.modules():  # behind the engine's hooks, which gather
            self._handles.append(part.register_forward_pre_hook(lambda *_: self.sample()))
        for parameter in self.books.fresh:
            if parameter.requires_grad:
                # Before the engine's own hooks take the gradient over, and after.
                self._handles.append(parameter.register_hook(lambda gradient: self.sample([gradient])))
                self._handles.append(parameter.register_post_accumulate_grad_hook(lambda _: self.sample()))
        self._handles.append(self.stepping.register_step_pre_hook(lambda *_: self.sample()))
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(desugars(kind) for kind in types):
            return NotImplemented  # what a DTensor holds is seen
        if FakeTensor in types:
            return func(*args, **(kwargs or {}))
        is_watched = isinstance(func, OpOverload) and func.namespace in WATCHED
        gathers = is_watched and func._schema.name == GATHERS
        sent = list(tensors_in(args)) if is_watched and self.is_reducing else []
        if gathers:
            for tensor in tensors_in(args):
                self._gathered[tensor.untyped_storage()] = None
        if is_watched:
            self.sample(sent=sent)
        result = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            for tensor in tensors_in([result]):
                self._made[tensor.untyped_storage()] = None
        if is_watched:
            self.sample(sent=[*sent, *tensors_in([result])] if gathers else sent)
        return result

    def sample(self, incoming: Sequence[Tensor] = (), sent: Sequence[Tensor] = ()) -> None:
        """Look at what is held now, with gradients that are incoming, and tensors that are sent."""
        with _disable_current_modes(), torch.no_grad():
            gradients = storages([*self.books.gradients(), *incoming])
            kept = storages([*self.books.parameters(), *self.books.optimizer()])
            buffers = storages(self.books.buffers())
            buffers |= {at: size for at, size in storages(sent).items() if at not in gradients and at not in kept}
            made = {one.data_ptr(): one.nbytes() for one in self._made if one not in self._gathered}
        known = kept.keys() | gradients.keys() | buffers.keys()
        self.raise_to("buffers", sum(buffers.values()))
        self.raise_to("gradients", sum(size for at, size in gradients.items() if at not in buffers))
        self.raise_to("activations", sum(size for at, size in made.items() if at not in known))

    def raise_to(self, category: str, held: int) -> None:
        self.peaks[category] = max(self.peaks[category], held)

    def counted(self, peak_bytes: int) -> Memory:
        """What the rank holds; `peak_bytes` is all that it has ever held."""
        with torch.no_grad():
            parameters = storages(self.books.parameters())
            optimizer = storages(self.books.optimizer())
        held = {
            "parameters": sum(parameters.values()),
            "optimizer": sum(size for at, size in optimizer.items() if at not in parameters),
            **self.peaks,
        }
        return Memory(**held, other=max(0, peak_bytes - sum(held.values())))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in `values`, and in lists inside of them, that have a memory of their own."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, Tensor) and value.layout is torch.strided and not desugars(type(value)):
            yield value
