#!/bin/sh
# Behind an evaluation, FSDP2 goes on with weights that are no longer those that the optimizer holds.
#
# Versions: torch 2.13.0 (CPU, gloo), Python 3.11.
# Expected: a forward computes with the parameters as they are. Who changes them in place between two forwards (an average
#   swapped in for validation and out again, the train() and eval() of a schedule-free optimizer) changes what is computed.
# Seen: the outermost group keeps its gathered copy behind a forward, which only a backward lets go of; an evaluation has
#   none. Shards that are changed then, in the optimizer's param_groups, are not gathered anew by the next forward: it
#   computes with the weights from before, a training step too. No error, no warning. net.reshard() is the remedy.
# Prints a net's output behind its weights were set to 0: with no forward before, behind an evaluation, and with the
#   remedy; fails (exit 1) once the second is 0, too, or one of the others is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/stale.py" <<'PY'
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def rank_main(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x = torch.ones(1, 2)
    for evaluates, reshards in ((False, False), (True, False), (True, True)):
        net = nn.Linear(2, 2, bias=False)
        nn.init.ones_(net.weight)
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        if evaluates:
            with torch.no_grad():
                net(x)
        if reshards:
            net.reshard()
        with torch.no_grad():  # as an optimizer that swaps averages in and out does
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.zero_()
        results[rank, evaluates, reshards] = net(x).sum().item()
    dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager:
        results = manager.dict()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mp.spawn(rank_main, (port, results), nprocs=2)
        seen = dict(results)
    print(f"torch {torch.__version__}; output of a net whose weights the optimizer's owner has set to 0")
    print(f"  before any forward        {seen[0, False, False]}")
    print(f"  behind an evaluation      {seen[0, True, False]}")
    print(f"  ... and net.reshard()     {seen[0, True, True]}")
    sys.exit(not (seen[0, False, False] == seen[0, True, True] == 0.0 != seen[0, True, False]))
PY
"$folder/venv/bin/python" "$folder/stale.py"
