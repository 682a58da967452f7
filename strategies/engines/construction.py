"""What a net's own code does to its tensors while they lie on the meta device, so that it can be done to real ones.

A constructor initialises as it likes: `self.apply(...)`, a parent's loop over its children, `torch.nn.init` on a raw
parameter, a copy of another net. On the meta device all of that happens, but to nothing. Here it is written down,
operator by operator, and done again for one tensor at a time, by a rank that needs that one. An operator that draws at
random is seeded by its place in what was written down: the same on every rank, and for a tensor and its copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from strategies.engines.draws import draws_of, seed_of

CPU = torch.device("cpu")
IS_META = cast(Any, Tensor.is_meta).__get__
# What makes a tensor of numbers without an operator that a dispatch mode would see.
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)


class Operator(NamedTuple):
    """One that ran, with the storages that it read, and those that it made or changed."""

    number: int
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    read: frozenset[int]
    changed: frozenset[int]

    @property
    def draws(self) -> bool:
        tags = getattr(self.function, "tags", ())
        return torch.Tag.nondeterministic_seeded in tags or is_initializer(self.function)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What it does, whichever tensors it does it to."""
        numbers = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if not isinstance(leaf, Tensor)]
        return str(self.function), *map(repr, numbers)


class Construction:
    """Operators on meta tensors, in order, and which storage each parameter and buffer of a module had in the end."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.places: dict[str, Tensor] = {}  # by FQN
        self.kept: list[Any] = []  # tensors, so that no storage's address comes up again
        self.depth = 0

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operator has run; if it has nothing to do with meta tensors it is not kept."""
        given, made = tensors((args, kwargs)), tensors(result)
        if not any(tensor.is_meta for tensor in (*given, *made)):
            return
        read = frozenset(map(storage, given))
        new = frozenset(map(storage, made)) - read
        changed = frozenset(map(storage, tensors(list(written_to(function, args, kwargs)))))
        self.kept += [*given, *made]
        if new or changed:  # else it only gave a view
            # What lies in memory is kept as it is now: its owner may change it.
            args, kwargs = tree_map(kept_value, (args, kwargs))
            self.operators.append(Operator(len(self.operators), function, args, kwargs, result, read, new | changed))

    def remember(self, module: nn.Module) -> None:
        """Which tensors `module` holds now."""
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self.places |= {fqn: tensor.detach() for fqn, tensor in named if tensor.is_meta}

    def of(self, fqn: str) -> list[Operator]:
        """Operators that changed the tensor called `fqn` once it was there."""
        place = self.places.get(fqn)
        if place is None:
            return []
        key = storage(place)
        return [one for one in self.operators if key in one.changed and (key in one.read or not is_empty(one))]

    def is_read(self, fqn: str) -> bool:
        """Whether another tensor was made of it: a copy is to equal what it is a copy of."""
        key = storage(self.places[fqn])
        return any(key in one.read and one.changed - {key} for one in self.operators)

    def copied_from(self, fqn: str) -> str | None:
        """The FQN of what the tensor called `fqn` is a copy of, and nothing else; None if it is none."""
        done = self.of(fqn)
        if [str(one.function) for one in done] != ["aten.clone.default"]:
            return None
        (source,) = done[0].read
        return next((name for name, meta in self.places.items() if storage(meta) == source), None)

    def value(self, fqn: str, seed: int, untouched: Callable[[str], Tensor]) -> Tensor:
        """The tensor called `fqn` as the module's own code makes it, on the CPU, in its own format.

        untouched: gives the value of a tensor that was read and that no operator had filled.
        """
        place = self.places[fqn]
        wanted, chosen = {storage(place)}, list[Operator]()
        for one in reversed(self.operators):
            if one.changed & wanted:
                chosen.append(one)
                wanted |= one.read
        real: dict[int, Tensor] = {}
        owners = {storage(meta): name for name, meta in reversed(self.places.items()) if name != fqn}

        def stand_in(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_meta:
                key = storage(leaf)
                if key not in real:
                    real[key] = (
                        laid_out(self.places[owners[key]], untouched(owners[key])) if key in owners else empty(leaf)
                    )
                return torch.as_strided(real[key], leaf.size(), leaf.stride(), leaf.storage_offset())
            return CPU if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        with torch.no_grad():
            for one in reversed(chosen):
                args, kwargs = tree_map(stand_in, (one.args, one.kwargs))
                if one.draws:
                    with draws_of(seed_of(seed, "operator", one.number), CPU):
                        made = one.function(*args, **kwargs)
                else:
                    made = one.function(*args, **kwargs)
                for meta, tensor in zip(tensors(one.result), tensors(made), strict=True):
                    if storage(meta) not in one.read:
                        real[storage(meta)] = laid_out(meta, tensor)
        return cast(Tensor, stand_in(place)).clone()


def is_initializer(function: Any) -> bool:
    return getattr(function, "__module__", None) == nn.init.__name__


def written_to(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Those of an operator's arguments that it changes in place."""
    schema = getattr(function, "_schema", None)
    for number, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[number] if number < len(args) else kwargs.get(argument.name)


def laid_out(meta: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory that `meta` says: all of its storage, in one dim."""
    flat = empty(meta).to(value.dtype)
    torch.as_strided(flat, meta.size(), meta.stride(), meta.storage_offset()).copy_(value)
    return flat


def empty(meta: Tensor) -> Tensor:
    """Memory for all of a tensor's storage, in one dim."""
    return torch.zeros(meta.untyped_storage().nbytes() // meta.itemsize, dtype=meta.dtype)


def is_empty(operator: Operator) -> bool:
    """Whether it makes tensors without giving them values."""
    return str(operator.function).startswith(("aten.empty", "aten.new_empty"))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept_value(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


class _Operators(TorchDispatchMode):
    def __init__(self, construction: Construction) -> None:
        super().__init__()
        self.construction = construction

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.construction.note(func, args, kwargs or {}, result)
        return result


class _Numbers(TorchFunctionMode):
    def __init__(self, construction: Construction) -> None:
        super().__init__()
        self.construction = construction

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func == IS_META and result and (caller := sys._getframe(1)).f_globals.get("__name__") == nn.init.__name__:
            self.note_initializer(caller, args[0])
        if func in FROM_NUMBERS and isinstance(result, Tensor) and result.is_meta and not tensors((args, kwargs)):
            on_cpu = {key: value for key, value in kwargs.items() if key != "device"}
            self.construction.note(func, args, {**on_cpu, "device": torch.device("meta")}, result)
        return result

    def note_initializer(self, caller: FrameType, tensor: Tensor) -> None:
        """One of torch.nn.init's functions has seen that its tensor is on meta, and will leave it alone.

        Those that draw until something holds, or decompose what they drew (`trunc_normal_`, `orthogonal_`, `sparse_`),
        do so: they are done as a whole, with the arguments that they were called with.
        """
        code = caller.f_code
        given = {name: caller.f_locals[name] for name in code.co_varnames[: code.co_argcount]}
        key = frozenset({storage(tensor)})
        operators, function = self.construction.operators, getattr(nn.init, code.co_name)
        operators.append(Operator(len(operators), function, (), given, tensor, key, key))
        self.construction.kept.append(tensor)


# What was written down of each module, as long as it is there.
CONSTRUCTIONS: WeakKeyDictionary[nn.Module, Construction] = WeakKeyDictionary()


@contextmanager
def written_down(construction: Construction) -> Iterator[None]:
    """Note what is done to meta tensors inside."""
    construction.depth += 1
    try:
        if construction.depth > 1:
            yield
            return
        with _Operators(construction), _Numbers(construction):
            yield
    finally:
        construction.depth -= 1


# Nets whose initialisation has been made up for.
INITIALIZED: WeakSet[nn.Module] = WeakSet()


def initialize_late(module: nn.Module) -> None:
    """Have nets initialise themselves that leave that out where they are built on meta.

    transformers does (5.24: PreTrainedModel.init_weights), whose `initialize_weights` is then called by whoever gives
    the net real tensors.
    """
    is_late = callable(getattr(module, "initialize_weights", None)) and callable(getattr(module, "_init_weights", None))
    if not is_late:
        for part in module.children():
            initialize_late(part)
    elif module not in INITIALIZED and any(parameter.is_meta for parameter in module.parameters()):
        INITIALIZED.add(module)
        cast(Any, module).initialize_weights()


@contextmanager
def constructing(module: nn.Module) -> Iterator[None]:
    """Note what builds the parts of `module` that are built inside, such as `configure_model`."""
    construction = CONSTRUCTIONS.get(module) or Construction()
    with written_down(construction):
        yield
    keep(construction, module)


def keep(construction: Construction, module: nn.Module) -> None:
    """Let what was written down be what made `module`."""
    with written_down(construction):
        initialize_late(module)
    construction.remember(module)
    CONSTRUCTIONS[module] = construction
