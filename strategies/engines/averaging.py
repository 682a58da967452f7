"""What ranks agree on besides gradients: averages that are right for integers too, and buffers."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


def share_buffers(buffers: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """The first rank's buffers go to all of `group`, as under DDP: statistics of a BatchNorm are one rank's."""
    for buffer in buffers:
        if buffer.is_floating_point():
            dist.broadcast(buffer, group_src=0, group=group)


class AveragesExactly(DDPStrategy):
    """Mixed into every engine that Lightning's DDP strategy reduces metrics for.

    Lightning weights validation batches by their sizes, but averages those as integers, which truncates: with 10 and 9
    samples on two ranks, `self.log(..., sync_dist=True)` would divide by 9.
    """

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        return super().reduce(tensor if tensor.is_floating_point() else tensor.double(), group, reduce_op)
