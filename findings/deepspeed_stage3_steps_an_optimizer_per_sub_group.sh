#!/bin/sh
# Under DeepSpeed's ZeRO-3 an optimizer that counts its steps in a param group counts several of each.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo), Python 3.11.
# Expected: engine.step() is one step of the optimizer that was given, at every stage of ZeRO.
# Seen: stage 3 calls optimizer.step() once for each sub-group of parameters (zero_optimization.sub_group_size elements),
#   and lets the param group hold one at a time. What is kept per parameter is none the wiser. But a count in the group,
#   as schedule-free optimizers, Prodigy and many schedules within an optimizer have it, moves with every sub-group: later
#   layers take another step than earlier ones. The default sub-group is 1e9 elements, so that small trials are right.
# Prints how often one step is counted at stages 1 and 3, and a weight of each of three equal layers; fails (exit 1) once
#   stage 3 counts it once.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8
cat > "$folder/counting.py" <<'PY'
import os
import sys

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ["DS_ACCELERATOR"] = "cpu"

import socket

import deepspeed
import torch
from torch import nn

# An all-reduce over shared memory that takes a minute to compile; gloo's does.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

with socket.create_server(("127.0.0.1", 0)) as free:
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])


class Halving(torch.optim.SGD):
    """A rate that halves with every step, counted where optimizers count: in the param group."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] * 0.5 ** group["steps"])


def trained(stage):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    for layer in net:
        nn.init.eye_(layer.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "sub_group_size": 16},
    }
    optimizer = Halving(net.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=None)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    weights = []
    for layer in net:
        with deepspeed.zero.GatheredParameters(layer.weight, enabled=stage == 3):
            weights.append(round(layer.weight[0, 0].item(), 6))
    return optimizer.param_groups[0]["steps"], weights


print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
seen = {stage: trained(stage) for stage in (1, 3)}
for stage, (steps, weights) in seen.items():
    print(f"  stage {stage}: one step, counted as {steps}; first weight of each layer {weights}")
sys.exit(seen[1][0] != 1 or seen[3][0] == 1)
PY
"$folder/venv/bin/python" "$folder/counting.py" 2> "$folder/errors" || { code=$?; tail -3 "$folder/errors"; exit $code; }
