"""The optimizer of a grid's rank: steps the parts of parameters that the rank has, as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from itertools import chain
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from strategies.boxes import Box
from strategies.engines.owners import Owned, box_of, dealt, num_parts
from strategies.engines.probing import Scope, scope_of

if TYPE_CHECKING:
    from strategies.grid import Grid

BUCKET_BYTES = 25 * 2**20  # of gradients that are averaged at once, as DDP does


class Shards:
    """Stands plain tensors that share the shards' memory in for an optimizer's parameters.

    Sharded and plain parameters, on whatever meshes, can then be stepped by one fused kernel, which DTensors of two
    meshes cannot.
    """

    def __init__(self, optimizer: Optimizer, spec: Grid, duplicates: set[nn.Parameter], strategy: str) -> None:
        self.optimizer = optimizer
        groups: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
        if not any(groups):
            raise nothing_to_train(strategy)
        scope = check_scope(optimizer, groups, spec, strategy)
        self.owned: Mapping[Tensor, Owned] = {} if scope == "element" else dealt(chain(*groups))
        # Those that this rank steps, whole or its part of them.
        self.parameters = [[parameter for parameter in group if self.steps(parameter)] for group in groups]
        self.zero = torch.zeros((), dtype=torch.float32, device=local(next(chain(*groups)).detach()).device)
        holders = spec.mesh.data_ranks * spec.tensor
        # 1 / the ranks that hold the same elements: so that a sum over all ranks counts each element once.
        self.weights = [
            0.0 if parameter in duplicates else num_parts(parameter) / holders for parameter in chain(*self.parameters)
        ]
        for group, parameters in zip(optimizer.param_groups, self.parameters, strict=True):
            group["params"] = [self.stand_in(parameter) for parameter in parameters]
        self.parts: list[nn.Parameter] = list(chain(*(group["params"] for group in optimizer.param_groups)))
        self.is_first_step = True  # until gradients have been taken once

    def steps(self, parameter: nn.Parameter) -> bool:
        return parameter not in self.owned or self.owned[parameter].is_mine

    def stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer is given for a parameter: this rank's part, or all of it."""
        stepped = self.owned[parameter].stepped if parameter in self.owned else None
        return nn.Parameter(local(parameter.detach()), parameter.requires_grad) if stepped is None else stepped

    def connect(self) -> None:
        """Look again at what is stepped: a precision may have put master weights in place of the parts."""
        self.stepped: list[Tensor] = list(chain(*(group["params"] for group in self.optimizer.param_groups)))

        self.by_parameter: dict[Tensor, Tensor] = dict(zip(chain(*self.parameters), self.stepped, strict=True))

    def stepped_for(self, parameter: Tensor) -> Tensor:
        """What the optimizer steps in place of a parameter; this rank's part itself where it is not stepped at all."""
        return self.by_parameter.get(parameter, local(parameter.detach()))

    def take_gradients(self) -> None:
        self.is_first_step = False
        for owned in self.owned.values():
            owned.take_gradient()
        for parameter, part in zip(chain(*self.parameters), self.parts, strict=True):
            if parameter not in self.owned:
                part.grad = None if parameter.grad is None else local(parameter.grad)

    def give_weights(self) -> None:
        """What owners have stepped goes to all ranks' parts; collective."""
        for owned in self.owned.values():
            owned.give_weight()

    def box_of(self, part: Tensor) -> Box | None:
        """Which part of a parameter or buffer this rank steps, and has in a checkpoint; None if that is nothing."""
        owned = self.owned.get(part)
        if owned is None:
            return box_of(part)
        return Box.whole(part.shape) if owned.is_mine else None

    def square(self) -> Tensor:
        """This rank's share of the square of the whole model's gradient norm."""
        squares = [
            weight * torch.linalg.vector_norm(part.grad, dtype=torch.promote_types(part.dtype, torch.float32)).square()
            for part, weight in zip(self.stepped, self.weights, strict=True)
            if part.grad is not None
        ]
        if not squares:
            return self.zero.clone()  # of a stage that is frozen, or stepped by others, there is nothing to add up
        return torch.stack(squares).sum()

    def norm(self) -> Tensor:
        """L2 norm of the whole model's gradient; collective over all ranks."""
        total = self.square()
        dist.all_reduce(total)
        return total.sqrt()

    def scale_to(self, max_norm: float, norm: Tensor) -> None:
        """Scale all gradients so that their norm is at most `max_norm`, as torch.nn.utils.clip_grad_norm_ does."""
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = [part.grad for part in self.stepped if part.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)


def explain_empty(module: pl.LightningModule, strategy: str) -> None:
    """Let `configure_optimizers`, the next time, say why it finds nothing to train on this rank."""
    configure = module.configure_optimizers

    @wraps(configure)
    def explained() -> Any:
        del module.configure_optimizers
        try:
            return configure()
        except ValueError as error:
            if any(parameter.requires_grad for parameter in module.parameters()):
                raise
            raise nothing_to_train(strategy) from error

    module.configure_optimizers = explained  # type: ignore[method-assign]


def nothing_to_train(strategy: str) -> ValueError:
    return ValueError(
        f"strategy={strategy}: rank {dist.get_rank()} has no parameter to train, since those of its pipeline stages "
        f"are frozen, or left out by configure_optimizers; unfreeze one of them, or choose fewer stages."
    )


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank has, in the same memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient; zeros are put where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad)


def check_scope(optimizer: Optimizer, parameters: Sequence[Sequence[nn.Parameter]], spec: Grid, strategy: str) -> Scope:
    """By how much the optimizer looks at once; ValueError if it is more than a rank can step by itself."""
    kind = type(optimizer)
    needs_closure = signature(kind.step).parameters["closure"].default is Parameter.empty
    device = next(chain(*parameters)).device
    scope = scope_of(optimizer, [[one.dim() for one in group] for group in parameters], device)
    if spec.mesh.world_size > 1 and (needs_closure or scope == "all"):
        raise ValueError(
            f"strategy={strategy} steps each rank's parameters by themselves, but {kind.__name__} looks at all of them "
            f"at once, or at the loss again; choose optimizer=adamw or sgd, or strategy=single."
        )
    if scope != "element" and spec.cpu_offload:
        raise whole_parameter(kind, strategy)
    return scope


def whole_parameter(kind: type, strategy: str) -> ValueError:
    return ValueError(
        f"strategy={strategy} steps a part of each parameter by itself, but {kind.__name__} looks at a whole one; "
        f"choose optimizer=adamw or sgd, or strategy=ddp."
    )


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one format in lists of BUCKET_BYTES or so."""
    bucket: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda tensor: str(tensor.dtype)):
        full = sum(other.nbytes for other in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Average the gradients over the ranks of `group`, reduced in `dtype`.

    A parameter that this rank's samples have not reached counts as zeros, so that all ranks reduce as many elements.
    One that no rank's have reached is left without a gradient, as in one process, which would not decay it either.
    """
    missed = {id(parameter) for parameter in parameters if parameter.grad is None}
    by_gradient = {gradient(parameter): parameter for parameter in parameters}
    for bucket in buckets(list(by_gradient)):
        reached = [id(by_gradient[one]) not in missed for one in bucket]
        # The flat copy of a bucket is gone before the next is made.
        for one, is_reached in zip(bucket, average_bucket(bucket, reached, group, dtype), strict=True):
            if not is_reached:
                by_gradient[one].grad = None


def average_bucket(
    bucket: Sequence[Tensor], reached: Sequence[bool], group: dist.ProcessGroup, dtype: torch.dtype
) -> Sequence[bool]:
    """Average gradients in place; of each, whether any rank has one. Only a rank that has none waits for the answer."""
    flags = torch.tensor(reached, dtype=dtype).to(bucket[0].device, non_blocking=True)
    flat = torch.cat([*(gradient.reshape(-1).to(dtype) for gradient in bucket), flags])
    dist.all_reduce(flat, group=group)
    flat /= group.size()
    *parts, flags = flat.split([*(gradient.numel() for gradient in bucket), len(bucket)])
    for gradient, part in zip(bucket, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return reached if all(reached) else (flags > 0).tolist()
