"""Batch normalization with the statistics of all data ranks' samples, on CPUs as on GPUs.

torch.nn.SyncBatchNorm refuses tensors on a CPU. Formulas: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1;
means and variances of parts are put together after Chan, Golub and LeVeque 1979 (STAN-CS-79-773), equation 2.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize(module: nn.Module, group: dist.ProcessGroup | None) -> dict[str, nn.Module]:
    """Have every BatchNorm of a module take its statistics, in training, over the samples of all ranks of `group`.

    Returns them by FQN: all ranks have to call the same, in the same order.
    """
    if dist.get_world_size(group) == 1:
        return {}
    found: dict[str, nn.Module] = {}
    for fqn, part in module.named_modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm):
            part.forward = partial(forward, part, group)  # type: ignore[method-assign]
            found[fqn] = part
    return found


def forward(part: _BatchNorm, group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """What `part(x)` gives for this rank's samples x [samples, channels, ...]."""
    if not part.training:
        return type(part).forward(part, x)
    part._check_input_dim(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = [0, *range(2, x.dim())]
    count = wide.new_tensor(x.numel() / x.shape[1])
    variance, mean = torch.var_mean(wide, over, correction=0)
    mean, variance, count = whole(mean, variance, count, group)
    if part.track_running_stats:
        update(part, mean.detach(), variance.detach() * count / (count - 1))
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale = torch.rsqrt(variance + part.eps)
    out = (wide - mean.view(shape)) * scale.view(shape)
    if part.affine:
        out = out * part.weight.to(out.dtype).view(shape) + part.bias.to(out.dtype).view(shape)
    return out.to(x.dtype)


def whole(
    mean: Tensor, variance: Tensor, count: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [channels], and number of elements, of all ranks' parts together; collective."""
    parts = cast(Tensor, Gather.apply(torch.cat([mean, variance, count[None]]), group))
    channels = len(mean)
    means, variances, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), count


class Gather(torch.autograd.Function):
    """[ranks, n] of every rank's [n]; backward, a rank gets the sum of what the ranks' losses want of its part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = own.new_empty(dist.get_world_size(group), len(own))
        dist.all_gather_into_tensor(parts, own[None], group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


@torch.no_grad()
def update(part: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as torch's own layer does, whose variance is the unbiased one."""
    assert part.num_batches_tracked is not None
    part.num_batches_tracked.add_(1)
    momentum = 1.0 / float(part.num_batches_tracked) if part.momentum is None else part.momentum
    for running, now in ((part.running_mean, mean), (part.running_var, variance)):
        assert running is not None
        running.lerp_(now.to(running.dtype), momentum)
