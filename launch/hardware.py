"""What this machine offers, found without torch: GPUs by nvidia-smi."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Gpu:
    index: str
    uuid: str
    name: str
    compute_capability: float  # 8.0 = Ampere, the first with bfloat16 arithmetic


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use; empty without an NVIDIA driver, or with a torch that cannot use one."""
    if shutil.which("nvidia-smi") is None or version("torch").endswith("+cpu"):
        return ()
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return ()
    if answer.returncode != 0:  # a driver without a device says so through its exit code
        return ()
    return visible(parse(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


# The least driver for which a wheel of a CUDA major version runs (NVIDIA, CUDA Toolkit release notes, table
# "CUDA Toolkit and minimum required driver version for CUDA minor version compatibility").
LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}


def check_driver() -> None:
    """ValueError if the driver is older than what the installed torch was built for."""
    cuda = re.search(r"cuda[^=]*= *'(\d+)[.\d]*'", (find_torch() / "version.py").read_text())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):  # it has not said
        return
    driver = re.match(r"(\d+)[.\d]*", answer.stdout.strip())
    least = LEAST_DRIVERS.get(int(cuda[1])) if cuda else None
    if driver and least and cuda and int(driver[1]) < least:
        raise ValueError(
            f"launcher.accelerator=gpu: the driver is {driver[0]}, and torch {version('torch')} is built for CUDA "
            f"{cuda[1]}, which needs {least} or newer; update the driver, or set launcher.accelerator=cpu."
        )


def find_torch() -> Path:
    """Where torch is installed, without importing it."""
    return Path(str(distribution("torch").locate_file("torch")))


def parse(answer: str) -> tuple[Gpu, ...]:
    """The rows of nvidia-smi's answer."""
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines() if line.strip()]
    return tuple(
        Gpu(index=index, uuid=uuid, name=name, compute_capability=float(capability))
        for index, uuid, name, capability in rows
    )


def visible(found: tuple[Gpu, ...], entries: str | None) -> tuple[Gpu, ...]:
    """Those of `found` that CUDA_VISIBLE_DEVICES=`entries` shows, in its order; CUDA stops at the first invalid one.

    A slice of a GPU (MIG-...) is listed by its own UUID, which nvidia-smi's list lacks: it counts as one of the first.
    """
    if entries is None:
        return found
    shown: list[Gpu] = []
    for entry in (word.strip() for word in entries.split(",")):
        match = [gpu for gpu in found if entry and (gpu.index == entry or gpu.uuid.startswith(entry))]
        if not match and entry.startswith("MIG-"):
            match = list(found[:1])
        if not match:
            break
        shown.append(match[0])
    return tuple(shown)
