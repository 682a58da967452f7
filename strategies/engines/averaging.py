"""What ranks agree on besides gradients: averages that are right for integers too, and buffers."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

# What gloo does not know (torch 2.13: "Invalid scalar type"); NCCL lacks the unsigned ones, too.
UNSENT = {
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.int16, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip


def share_buffers(buffers: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """The first rank's buffers go to all of `group`, as under DDP: statistics of a BatchNorm are one rank's."""
    for buffer in buffers:
        if buffer.is_floating_point() or buffer.is_complex():
            send(buffer, group)


def send(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """The first rank's tensor goes to all, whatever its format."""
    if tensor.dtype not in UNSENT:
        dist.broadcast(tensor, group_src=0, group=group)
        return
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    dist.broadcast(flat, group_src=0, group=group)
    tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))


def unsent(module: nn.Module) -> list[str]:
    """Buffers that DDP could not send, by their names."""
    return [fqn for fqn, buffer in module.named_buffers() if buffer.dtype in UNSENT]


class AveragesExactly(DDPStrategy):
    """Mixed into every engine that Lightning's DDP strategy reduces metrics for.

    Lightning weights validation batches by their sizes, but averages those as integers, which truncates: with 10 and 9
    samples on two ranks, `self.log(..., sync_dist=True)` would divide by 9.
    """

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        return super().reduce(tensor if tensor.is_floating_point() else tensor.double(), group, reduce_op)
