"""Sharded parameters for an optimizer that looks at whole ones: each is stepped by one of the ranks that share it.

As in ZeRO's first stage (Rajbhandari et al. 2020, section 5.1), but whole parameters are dealt out, not pieces of them:
Muon's product of a matrix, a row's mean of Adafactor or a norm of LAMB is then what it is in one process. A step
gathers the gradient of each such parameter, and broadcasts its new weight: as much traffic as FSDP's gathering for a
forward, twice. The optimizer's state of a parameter lies whole on its owner.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from strategies.boxes import Box


class Owned:
    """A parameter that is split over ranks and stepped, whole, by one of them."""

    def __init__(self, parameter: nn.Parameter, owner: int) -> None:
        """owner: which of the ranks that share it, counted in the order of its split dims. Collective over them."""
        self.parameter, self.box = parameter, box_of(parameter)
        split = split_dims(parameter)
        mesh = self.sharded.device_mesh
        self.groups = [mesh.get_group(dim) for dim in split]
        self.place: list[int] = []  # of the owner in each of the groups
        for dim in reversed(split):
            owner, here = divmod(owner, mesh.size(dim))
            self.place.insert(0, here)
        self.is_mine = self.place == [mesh.get_local_rank(dim) for dim in split]
        whole = whole_of(self.sharded.detach())
        self.stepped = nn.Parameter(whole, parameter.requires_grad) if self.is_mine else None

    @property
    def sharded(self) -> DTensor:
        assert isinstance(self.parameter, DTensor)
        return self.parameter

    def take_gradient(self) -> None:
        """The owner's copy gets the whole gradient; collective."""
        gradient = None if self.parameter.grad is None else whole_of(self.parameter.grad)
        if self.stepped is not None:
            self.stepped.grad = gradient

    @torch.no_grad()
    def give_weight(self) -> None:
        """Every rank's part becomes that of the owner's copy; collective."""
        local = self.sharded.to_local()
        if self.stepped is not None:
            whole = self.stepped.detach()
        else:
            whole = torch.empty(self.sharded.shape, dtype=local.dtype, device=local.device)
        # Along one dim after the other: in the end the owner's is everywhere, whatever was sent before.
        for group, place in zip(self.groups, self.place, strict=True):
            dist.broadcast(whole, group_src=place, group=group)
        if self.box is not None:
            local.copy_(whole[self.box.inside(Box.whole(whole.shape))])


def whole_of(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every rank; collective."""
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def split_dims(parameter: Tensor) -> list[int]:
    """Dims of a parameter's mesh that it is split along."""
    if not isinstance(parameter, DTensor):
        return []
    return [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]


def box_of(part: Tensor) -> Box | None:
    """Which part of a tensor this rank has; None if that is nothing."""
    if not isinstance(part, DTensor):
        return Box.whole(part.shape)
    shape, offset = compute_local_shape_and_global_offset(part.shape, part.device_mesh, part.placements)
    box = Box(tuple(offset), tuple(start + size for start, size in zip(offset, shape, strict=True)))
    return box if box.numel else None


def num_parts(parameter: Tensor) -> int:
    """In how many parts a parameter is split over data and tensor ranks."""
    mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
    count = 1
    for dim in split_dims(parameter):
        assert mesh is not None
        count *= mesh.size(dim)
    return count


def dealt(parameters: Iterable[nn.Parameter]) -> dict[Tensor, Owned]:
    """Those that are split, each with an owner, such that owners step about as many elements; collective."""
    loads: dict[int, list[int]] = {}  # by number of parts: elements of each place
    found: dict[Tensor, Owned] = {}
    for parameter in parameters:
        parts = num_parts(parameter)
        if parts == 1:
            continue
        load = loads.setdefault(parts, [0] * parts)
        owner = load.index(min(load))
        load[owner] += parameter.numel()
        found[parameter] = Owned(parameter, owner)
    return found
