"""Averages over ranks that are right for integers too."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


class AveragesExactly(DDPStrategy):
    """Mixed into every engine that Lightning's DDP strategy reduces metrics for.

    Lightning weights validation batches by their sizes, but averages those as integers, which truncates: with 10 and 9
    samples on two ranks, `self.log(..., sync_dist=True)` would divide by 9.
    """

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        return super().reduce(tensor if tensor.is_floating_point() else tensor.double(), group, reduce_op)
