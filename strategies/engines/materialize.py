"""Meta-device nets become real ones here: every parameter gets its first value from (seed, FQN) and nothing else."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


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
        for name, value in draw(module, owned, fqn, self.seed).items():
            meta = owned[name]
            put(module, name, meta)
            if meta not in self.made:
                value = value.to(device=self.device, dtype=meta.dtype)
                self.made[meta] = nn.Parameter(value, meta.requires_grad) if isinstance(meta, nn.Parameter) else value


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


def draw(module: nn.Module, owned: dict[str, Tensor], fqn: str, seed: int) -> dict[str, Tensor]:
    """Initial values of the tensors `owned` by `module`, in float32 on the CPU; the module is left holding them."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"model: {type(module).__name__} at {fqn or 'the root'} holds {', '.join(owned)} but has no "
            f"reset_parameters(); add one that gives them their first values, as torch's own layers do."
        )
    for name, meta in owned.items():
        dtype = torch.float32 if meta.is_floating_point() else meta.dtype
        value = torch.empty(meta.shape, dtype=dtype, device="cpu")
        put(module, name, nn.Parameter(value, meta.requires_grad) if isinstance(meta, nn.Parameter) else value)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every kind of accelerator besides, and note a stack of calls for each that is not
        # there: a fifth of a small run's start-up.
        torch.default_generator.manual_seed(parameter_seed(seed, fqn))
        reset()
    return {name: getattr(module, name).detach() for name in owned}


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer that the module already has a place for."""
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
