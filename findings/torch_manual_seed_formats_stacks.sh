#!/bin/sh
# torch.manual_seed() on a machine without an accelerator formats the caller's whole stack, several times a call.
#
# Versions: torch 2.13.0 (CPU), Python 3.11.
# Expected: seeding the CPU's generator takes microseconds, whoever calls it: it writes one state.
# Seen: manual_seed() also seeds every kind of accelerator. One that is not initialised is told later, and to say then who
#   asked, traceback.format_stack() is kept for each kind. The time grows with the depth of the stack: from 100 frames
#   down it is hundreds of times that of torch.default_generator.manual_seed(), which seeds the CPU alone. Who seeds each
#   layer of a net by itself, so that its first weights do not depend on the number of processes, pays it per layer.
# Fails (exit 1) once manual_seed() takes less than ten times the generator's own.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/seed.py" <<'PY'
import statistics
import sys
import time

import torch


def microseconds(seed, depth):
    if depth:
        return microseconds(seed, depth - 1)
    times = []
    for number in range(200):
        began = time.perf_counter()
        seed(number)
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)


print(f"torch {torch.__version__}; microseconds a call, median of 200")
for depth in (0, 30, 100):
    whole, alone = microseconds(torch.manual_seed, depth), microseconds(torch.default_generator.manual_seed, depth)
    print(f"  {depth:3} frames deep: torch.manual_seed {whole:8.1f}   default_generator.manual_seed {alone:6.1f}")
sys.exit(whole < 10 * alone)
PY
"$folder/venv/bin/python" "$folder/seed.py"
