"""What this machine offers, found without torch: GPUs by nvidia-smi, cores by the scheduler."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    compute_capability: float  # 8.0 = Ampere, the first with bfloat16 arithmetic
    memory_gib: float


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES lets this process see; empty without an NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return ()
    if answer.returncode != 0:  # a driver without a device says so through its exit code
        return ()
    found = [parse_gpu(line) for line in answer.stdout.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found)
    return tuple(found[: len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])])


def parse_gpu(line: str) -> Gpu:
    name, capability, memory_mib = (field.strip() for field in line.rsplit(",", 2))
    return Gpu(name=name, compute_capability=float(capability), memory_gib=float(memory_mib) / 1024)
