#!/usr/bin/env bash
# copy.copy of a torch optimizer leaves out what a subclass has added.
#
# Expected: a shallow copy has the same attributes, as Python's copy of any other object has.
# Seen: Optimizer.__getstate__ gives defaults, state and param_groups alone; the copy of an optimizer whose subclass sets
# one more attribute fails with AttributeError at its first step. It matters to who tries an optimizer on other tensors.
# Seen with Python 3.11, torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import torch


class Scaled(torch.optim.SGD):
    def __init__(self, params, lr, scale):
        super().__init__(params, lr=lr)
        self.scale = scale


made = Scaled([torch.nn.Parameter(torch.ones(2))], lr=0.1, scale=3.0)
lost = sorted(vars(made).keys() - vars(copy.copy(made)).keys())
print("torch", torch.__version__, "lost by copy.copy:", lost)
assert "scale" in lost, "copy.copy keeps it now"
PYTHON
