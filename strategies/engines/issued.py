"""Process groups: how many collectives they have issued, which tells ranks that wait apart, and how long they wait."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _world

# Public since torch 2.14, which warns of its old name.
set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout


def collectives_issued() -> dict[str, int]:
    """By the names of this rank's process groups; ranks of a group that agree have issued as many.

    Of a group along a pipeline that is not so with gloo, which counts sends and receives, too.
    """
    if not dist.is_initialized():
        return {}
    groups: list[Any] = [group for group in list(_world.pg_map) if group.size() > 1]
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


def waits_in_call() -> bool:
    """Whether a rank that waits for others does so in the call of the collective, as with gloo.

    With NCCL the call returns, and it waits wherever it first looks at a result.
    """
    return not dist.is_initialized() or dist.get_backend() == "gloo"


def set_timeouts(seconds: float) -> None:
    """Have all groups of this rank wait so long; whoever has made them, as a rule they were given torch's default."""
    if dist.is_initialized():
        for group in list(_world.pg_map):
            set_timeout(timedelta(seconds=seconds), group)
