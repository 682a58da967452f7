"""RunRecord: the one schema that a run's local file, W&B and the reports share."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tracking.found import Found
from tracking.revision import ROOT, git_revision, source_digest

VERSION: Literal[2] = 2
READABLE = (1, VERSION)  # what a newer version adds has a default in an older record


class _Schema(BaseModel):
    # JSON has no NaN: a diverged loss is written as the string "NaN", "Infinity" or "-Infinity",
    # which any JSON reader accepts and pydantic reads back as the float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


@final
class Environment(_Schema):
    """Where a run ran; nothing in it names the host or the user."""

    python: str
    torch: str
    lightning: str
    revision: str | None = Field(description="git commit of Concord, with -dirty and a digest if files differ from it")
    source: str | None = Field(None, description="digest of the source of model and data, as the run imported it")
    os: str
    device: str
    device_count: int
    cores: int
    memory_gib: float


@final
class Mesh(_Schema):
    """Sizes of the mesh axes; their product is the world size."""

    pipe: int = Field(ge=1)
    data: int = Field(ge=1)
    tensor: int = Field(ge=1)


@final
class Precision(_Schema):
    """What each kind of number was held in, as dtype names such as float32."""

    name: str
    parameter: str
    compute: str
    reduce: str
    master: str


@final
class Stats(_Schema):
    """Size of the model; FLOPs are those of one training sample, forward and backward."""

    parameters: int
    flops_per_sample: float | None


@final
class Batch(_Schema):
    """How many samples go into an optimizer step (`global`) and into one forward of a data rank (`micro`)."""

    model_config = ConfigDict(populate_by_name=True)

    global_: int = Field(alias="global")
    micro: int
    accumulation: int
    tokens_per_sample: int
    order: str | None = None  # of the samples; None where only the data's own code knows it, and in older records


@final
class Memory(_Schema):
    """Bytes that one rank holds in a step, each category at its own peak.

    Parameters, gradients, optimizer and buffers (of communication) are those of `strategies.spec.Memory`, counted from
    the tensors. Other is what is left of the rank's peak as `Results.memory_source` tells it.
    """

    parameters: int = Field(ge=0)
    gradients: int = Field(ge=0)
    optimizer: int = Field(ge=0)
    buffers: int = Field(ge=0)
    activations: int = Field(ge=0, description="made by forwards, and alive")
    other: int = Field(ge=0)


@final
class Collective(_Schema):
    """What one rank hands to one kind of collective over one mesh axis in an optimizer step."""

    collective: str
    axis: Literal["pipe", "data", "tensor", "mixed"]
    ranks: int = Field(description="size of the group")
    calls: float
    payload: float = Field(description="bytes, as tracking.traffic counts them")
    seconds: float | None = Field(None, description="in which one was under way: all its ranks had called it")


@final
class Results(_Schema):
    """What a run reached and cost.

    A time is None when no step was left after the warm-up, a loss when no step (no validation) was made.
    """

    steps: int = Field(description="optimizer steps of the whole run, those before a resume included")
    skipped_steps: int = Field(0, description="steps left out since the start or resume, under trainer.on_nan=skip")
    train_loss: float | None = Field(description="last logged train/loss: mean over the steps since the log before")
    val_loss: float | None
    val_metrics: dict[str, float] = Field(description="every val/* metric of the last validation, by its key")
    val_of_one_rank: list[str] = Field([], description="metrics that are the first rank's own, not all ranks' mean")
    tokens_per_s: float | None
    step_ms_p50: float | None
    step_ms_p95: float | None
    mfu: float | None
    peak_flops_per_device: float | None = Field(description="measured by a matmul, mean over the ranks")
    peak_gib: list[float] = Field(description="one per rank")
    memory_source: Literal["cuda allocator", "resident set"]
    warmup_rule: str
    wall_s: float
    startup_s: float = Field(description="part of wall_s that went by before the first training step began")
    # From here on since version 2; empty where no step was traced.
    memory: list[Memory] = Field([], description="one per rank")
    memory_limit: int | None = Field(None, description="bytes of the device, on CPU of the host; the smallest rank's")
    traffic: list[list[Collective]] = Field([], description="per optimizer step, one list per rank")
    wait_share: list[float] = Field([], description="part of a traced step in which the rank waited for others")
    idle_share: list[float] = Field([], description="part of that step in which, too, nothing of it was under way")
    traced_steps: list[int] = Field([], description="optimizer steps of which the above and trace.json are")


@final
class RunRecord(_Schema):
    """Everything that is kept of a finished run, so that any two runs can be laid side by side."""

    version: Literal[1, 2] = VERSION
    run_id: str
    name: str
    group: str | None = Field(description="the sweep")
    strategy: str
    model: str
    data: str
    seed: int
    config: dict[str, Any]
    config_hash: str
    environment: Environment
    world_size: int
    mesh: Mesh
    precision: Precision
    model_stats: Stats
    batch: Batch
    found: Found | None = Field(None, description="what ran, as read from the live objects; none of older records")
    results: Results

    def write(self, path: Path) -> None:
        """Write as JSON; a reader sees the whole file or none, also when the writer is killed."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises ValueError when the file is damaged or of another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; run that job again.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it holds no JSON object; run that job again.")
        found = content.get("version")
        if found not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ValueError(f"{path}: version={found!r} is unknown, this Concord reads {known}; update Concord.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path} is damaged: {key}: {first['msg']}; run that job again.") from None


def environment(*, device: str | None = None, device_count: int = 1) -> Environment:
    """This machine and its software; `device` is the accelerator's name, None for the CPU's own."""
    return Environment(
        python=platform.python_version(),
        torch=version("torch"),
        lightning=version("lightning"),
        revision=git_revision(ROOT),
        source=source_digest(),
        os=f"{platform.system()} {platform.release()}",
        device=device or cpu_name(),
        device_count=device_count,
        cores=usable_cores(),
        memory_gib=round(host_memory() / 2**30, 1),
    )


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
