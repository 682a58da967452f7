"""How ranks come to know, all at the same place of their training, what any one of them asks for."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Vote:
    """Ballots among all ranks, whose outcome is known one ballot later: nobody ever waits for the slowest.

    Each is a small all-reduce in host memory that is begun, and asked for its outcome at the next.
    """

    def __init__(self, world_size: int, timeout_s: float) -> None:
        """Collective, where there are several ranks."""
        timeout = timedelta(seconds=timeout_s)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self.ballot: tuple[Tensor, dist.Work] | None = None

    def cast(self, *asked: int) -> list[int]:
        """The largest that any rank asked for in the ballot before, zeros in the first; at once on a single rank."""
        if self.group is None:
            return list(asked)
        outcome = self.outcome() or [0] * len(asked)
        asks = torch.tensor(asked)
        work = dist.all_reduce(asks, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.ballot = asks, work
        return outcome

    def outcome(self) -> list[int] | None:
        """Of the last ballot, which is closed by it; None if there is none."""
        if self.ballot is None:
            return None
        asks, work = self.ballot
        self.ballot = None
        work.wait()
        return [int(ask) for ask in asks.tolist()]
