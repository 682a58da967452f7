"""Meta-device nets become real ones here: every parameter gets its first value from (seed, FQN) and nothing else."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from strategies.engines.construction import CONSTRUCTIONS, Construction, written_down


def parameter_seed(seed: int, fqn: str) -> int:
    """A 63-bit seed for the module called `fqn`, the same on every rank, machine and torch version."""
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def owned_meta_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that `module` itself (not a child) holds and that have no storage yet."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.is_meta:
            yield name, tensor


def nothing(module: nn.Module) -> None:
    """What most strategies do to a module that has just been made."""


class Materializer:
    """Makes the parts of a net that a rank owns, with the values that the whole net would have.

    Knows where every parameter of `root` stands first, so that one that is shared with a part which is not made here,
    or has been cut off since, still gets its values by its owner's FQN.
    """

    def __init__(self, root: nn.Module, device: torch.device, seed: int) -> None:
        self.root, self.device, self.seed = root, device, seed
        self.construction = CONSTRUCTIONS.get(root) or Construction()
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.owners: dict[Tensor, tuple[str, nn.Module]] = {}
        self.shared: set[Tensor] = set()
        for fqn, module in root.named_modules():
            for _, tensor in owned_meta_tensors(module):
                if tensor in self.owners:
                    self.shared.add(tensor)
                self.owners.setdefault(tensor, (fqn, module))
        self.made: dict[Tensor, Tensor] = {}

    def make(self, prefix: str = "", after: Callable[[nn.Module], None] = nothing) -> None:
        """Materialize the module called `prefix` and all in it, see `materialize`; what was not on meta is moved."""
        for module in self.root.get_submodule(prefix).modules():
            owned = dict(owned_meta_tensors(module))
            for meta in owned.values():
                if meta not in self.made:
                    self.draw(*self.owners[meta])
            for name, meta in owned.items():
                put(module, name, self.made[meta])
                if meta not in self.shared:
                    del self.made[meta]  # it may be sharded next: nobody is to hold it whole
            after(module)
        self.root.get_submodule(prefix).to(self.device)

    def draw(self, fqn: str, module: nn.Module) -> None:
        """Make the tensors that `module` owns; it is left holding them on meta."""
        owned = dict(owned_meta_tensors(module))
        for name, value in self.values(fqn, module, owned).items():
            meta = owned[name]
            if meta not in self.made:
                value = value.to(device=self.device, dtype=meta.dtype)
                self.made[meta] = nn.Parameter(value, meta.requires_grad) if isinstance(meta, nn.Parameter) else value

    def values(self, fqn: str, module: nn.Module, owned: dict[str, Tensor]) -> dict[str, Tensor]:
        """Initial values of the tensors `owned` by the module called `fqn`, on the CPU."""
        names = {name: f"{fqn}.{name}" if fqn else name for name in owned}
        own = {name for name in owned if is_replayed(module, name, names[name], self.construction)}
        values = {name: self.construction.value(names[name], self.seed, self.untouched) for name in own}
        if owned.keys() - own:
            if not has_reset(module):
                raise no_values(module, fqn, owned.keys() - own)
            values = reset(module, owned, parameter_seed(self.seed, fqn)) | values
        return values

    def untouched(self, fqn: str) -> Tensor:
        """The value of a tensor that another one was made of, and that its own module alone gives values."""
        owner, _, name = fqn.rpartition(".")
        module = self.modules[owner]
        if not has_reset(module):
            raise no_values(module, owner, [name])
        prefix = f"{owner}." if owner else ""
        places = self.construction.places
        owned = {key: places[prefix + key] for key in held_names(module) if prefix + key in places}
        return reset(module, owned, parameter_seed(self.seed, owner))[name]


def materialize(root: nn.Module, device: torch.device, seed: int, after: Callable[[nn.Module], None] = nothing) -> None:
    """Give the meta-device tensors of `root` storage on `device` and their initial values, module by module.

    Values are drawn in float32 on the CPU and then cast, so that they are the same on every device and in every
    precision. Each module's `reset_parameters()` (torch's own convention) draws with a generator seeded by its FQN.
    A parameter shared by two modules stays one parameter, with the values of the module that comes first.
    Tensors that are not on the meta device keep their values: a net built eagerly is left as it is. `after` is called
    for every module once it holds its own tensors (not yet its children theirs), so that they can be sharded at once.

    Raises ValueError naming the module if it holds a parameter but has no `reset_parameters`.
    """
    Materializer(root, device, seed).make(after=after)


def no_values(module: nn.Module, fqn: str, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"model: {type(module).__name__} at {fqn or 'the root'} holds {', '.join(sorted(names))} but gives them no "
        f"values, and has no reset_parameters(); add one that does, as torch's own layers do."
    )


def is_replayed(module: nn.Module, name: str, fqn: str, construction: Construction) -> bool:
    """Whether a tensor's values are those that its net's code gave it, rather than `reset_parameters()` alone."""
    done = [one.signature for one in construction.of(fqn)]
    if not done:
        return False
    if not has_reset(module):
        return True
    alone = by_reset(module).get(name, [])
    if done == alone:
        return construction.is_read(fqn)
    # One that its constructor does not call is there for nets on the meta device, and has the last word.
    return is_torchs(module) or done[: len(alone)] == alone


def resetter(module: nn.Module) -> Any:
    return getattr(module, "reset_parameters", None)


def has_reset(module: nn.Module) -> bool:
    return resetter(module) is not None


def is_torchs(module: nn.Module) -> bool:
    """Whether `reset_parameters` is one of torch's own layers, whose constructors call it."""
    return str(resetter(module).__module__).startswith("torch.nn.")


def by_reset(module: nn.Module) -> dict[str, list[tuple[Any, ...]]]:
    """What `reset_parameters()` does to each tensor of a module that is on meta."""
    construction = Construction()
    with written_down(construction), torch.no_grad():
        resetter(module)()
    construction.places = dict(owned_meta_tensors(module))
    return {name: [one.signature for one in construction.of(name)] for name in construction.places}


def reset(module: nn.Module, owned: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What `reset_parameters()` gives the tensors `owned` by `module`, drawn in float32; the module keeps what it has.

    In float32, so that they are the same in every precision.
    """
    held = dict(module._parameters), dict(module._buffers)
    for name, meta in owned.items():
        dtype = torch.float32 if meta.is_floating_point() else meta.dtype
        value = torch.empty(meta.shape, dtype=dtype, device="cpu")
        put(module, name, nn.Parameter(value, meta.requires_grad) if name in module._parameters else value)
    try:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed every kind of accelerator besides, and note a stack of calls for each that is
            # not there: a fifth of a small run's start-up.
            torch.default_generator.manual_seed(seed)
            resetter(module)()
        return {name: getattr(module, name).detach() for name in owned}
    finally:
        module._parameters.update(held[0])
        module._buffers.update(held[1])


def held_names(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer that the module already has a place for."""
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
