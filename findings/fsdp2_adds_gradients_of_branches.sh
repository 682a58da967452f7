#!/bin/sh
# FSDP2 adds the gradients of two different branches of a net, where ranks' samples take different ones, without a word.
#
# Versions: torch 2.13.0 (CPU, gloo), Python 3.11.
# Expected: DDP refuses a parameter that a rank does not use, or with find_unused_parameters=True counts it as zeros: each
#   branch gets half of the gradient that its one rank has. FSDP2, left as it comes, refuses as well, or counts zeros.
# Seen: a group of parameters reduces those gradients that a rank has, packed in order. Rank 0 packs the first branch's,
#   rank 1 the second's; they are of one size, so the reduction succeeds. Each rank takes half of the *sum* for a shard of
#   the branch that it has used: no error, and the gradient of another function. The remedy is off by default and of this
#   version: FSDPModule.set_reduce_scatter_unused_params(True) has zeros reduced for what a rank lacks.
# Prints what rank 0's shards get beside what is right, with the remedy, too; fails (exit 1) once all are right without
#   it, torch refuses, or the remedy does not help.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/branches.py" <<'PY'
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x, goes_left):
        return self.left(x) if goes_left else self.right(x)


def rank_main(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for remedy in (False, True):
        net = fully_shard(Router(), mesh=init_device_mesh("cpu", (2,)))
        if remedy:
            net.set_reduce_scatter_unused_params(True)
        x = torch.tensor([[1.0, 1.0]]) if rank == 0 else torch.tensor([[10.0, 10.0]])
        net(x, goes_left=rank == 0).sum().backward()
        if rank == 0:
            for name, parameter in net.named_parameters():
                local = None if parameter.grad is None else parameter.grad.to_local()
                results[remedy, name] = None if local is None else local.flatten().tolist()
    dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager:
        results = manager.dict()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mp.spawn(rank_main, (port, results), nprocs=2)
        seen = dict(results)
    # Means over two ranks; dim 0 of size 1 lies on rank 0 alone.
    right = {"left.weight": [0.5, 0.5], "right.weight": [5.0, 5.0]}
    print(f"torch {torch.__version__}; gradients, as rank 0 holds them")
    for name, value in right.items():
        print(f"  {name:13} right {value}   FSDP2 {seen[False, name]}   with the remedy {seen[True, name]}")
    is_right = {remedy: all(seen[remedy, name] == value for name, value in right.items()) for remedy in (False, True)}
    sys.exit(is_right[False] or not is_right[True])
PY
"$folder/venv/bin/python" "$folder/branches.py"
