"""From a validated config to a job: all that is derived, and every rule between keys, before a process starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from datamodules.spec import Data
from launch.callbacks import check_callbacks
from launch.hardware import check_driver, gpus
from launch.schema import AUTO, ConfigError, RunConfig, build_spec
from strategies.spec import Mesh, Run, Strategy
from tracking.record import usable_cores
from tracking.steps import check_untraced, traced_steps

if TYPE_CHECKING:
    from models.stats import ModelStats

# CUDA devices below this have no bfloat16 arithmetic (NVIDIA CUDA C++ Programming Guide, compute capabilities).
BFLOAT16_CAPABILITY = 8.0

# A collective gives up later than the watchdog ends the run: its error would not name the rank that it waits for.
COLLECTIVE_MARGIN_S = 60


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that can start: its resolved config, the specs built from it, and what follows from them."""

    config: RunConfig
    strategy: Strategy
    data: Data
    accumulation: int  # micro-batches that one data rank runs per optimizer step

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def mesh(self) -> Mesh:
        return self.strategy.mesh

    @property
    def world_size(self) -> int:
        return self.mesh.world_size

    @property
    def extensions(self) -> tuple[str, ...]:
        """Names of DeepSpeed's C++ extensions that this run needs."""
        adam = ("cpu_adam",) if on_host(self.config) else ()
        return (*self.strategy.extensions, *adam)

    @property
    def block_keys(self) -> tuple[str, ...]:
        """What the run asks for of the plan's blocks, as the user has written it."""
        mode = self.strategy.activation_checkpointing
        words = {f"strategy.activation_checkpointing={mode}": mode != "none", "compile=true": self.config.compile}
        return tuple(word for word, asked in words.items() if asked)

    @property
    def unsaved(self) -> str | None:
        """What of it no checkpoint can hold, and what to choose instead; None where there is nothing."""
        return unsaved(self.strategy)

    @classmethod
    def of(cls, config: RunConfig) -> Job:
        """The job of a config whose mesh is resolved, as it stands in resolved.yaml."""
        strategy: Strategy = build_spec(config.strategy, "strategy", Strategy)
        data: Data = build_spec(config.data, "data", Data)
        return cls(
            config=config, strategy=strategy, data=data, accumulation=accumulation(data, strategy.mesh.data_ranks)
        )


def resolve(config: RunConfig, world_size: int | None = None, local_world_size: int | None = None) -> RunConfig:
    """The config with nothing left open: mesh, device, number of devices and threads are numbers.

    `world_size`, and how many of the ranks are on this machine, are given where a launcher outside has already
    started them. Raises ConfigError, one line
    with key, value and fix, for every rule between keys that is broken. Touches no file.
    """
    strategy: Strategy = build_spec(config.strategy, "strategy", Strategy)
    accelerator = choose_accelerator(config)
    if world_size is None:
        devices = choose_devices(config, accelerator)
    else:
        devices = world_size
        check_joined(config, accelerator, world_size, local_world_size or world_size)
    try:
        mesh = strategy.mesh.resolve(devices, strategy.rehearsal_ranks)
        run = run_of(config, build_spec(config.data, "data", Data), accelerator)
        dataclasses.replace(strategy, mesh=mesh).check(run)
        check_callbacks(config, strategy)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if world_size is not None and mesh.world_size != world_size:
        raise ConfigError(
            f"strategy.mesh={mesh.text} takes {mesh.world_size} ranks, but the launcher started {world_size}; "
            f"start {mesh.world_size}, or change strategy.mesh."
        )
    if accelerator == "gpu":
        try:
            check_driver()
        except ValueError as error:
            raise ConfigError(str(error)) from None
    check_precision(config, accelerator)
    check_vocabulary(config)
    check_optimizer(config, accelerator)
    check_checkpoint(config, strategy)
    try:
        check_looks(config, accelerator, mesh.world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    threads = config.launcher.threads_per_rank
    if threads == "auto":
        threads = max(1, usable_cores() // (local_world_size or mesh.world_size))
    launcher = {
        "accelerator": accelerator,
        "devices": mesh.world_size,
        "threads_per_rank": threads,
    }
    return config.model_copy(
        update={
            "strategy": {**config.strategy, "mesh": mesh.sizes},
            "launcher": config.launcher.model_copy(update=launcher),
        }
    )


def collective_timeout_s(config: RunConfig) -> float:
    """How long a collective may wait for other ranks while the run starts; the watchdog changes it then."""
    return config.launcher.startup_timeout_s + COLLECTIVE_MARGIN_S


def run_of(config: RunConfig, data: Data, accelerator: str, stats: ModelStats | None = None) -> Run:
    """What the config says to a strategy."""
    return Run(
        precision=config.precision,
        seed=config.seed,
        accelerator=accelerator,
        timeout_s=collective_timeout_s(config),
        micro_batch_size=data.micro_batch_size,
        compile=config.compile,
        sync_batchnorm=config.trainer.sync_batchnorm,
        stats=stats,
    )


def choose_accelerator(config: RunConfig) -> Literal["cpu", "gpu"]:
    wanted = config.launcher.accelerator
    if wanted == "gpu" and not gpus():
        raise ConfigError("launcher.accelerator=gpu, but this machine shows no GPU; set launcher.accelerator=cpu.")
    if wanted == "auto":
        return "gpu" if gpus() else "cpu"
    return wanted


def choose_devices(config: RunConfig, accelerator: str) -> int | None:
    """Devices the strategy may use; None on a CPU that was given no number, where processes are free."""
    devices = config.launcher.devices
    if accelerator == "cpu":
        return None if devices == "auto" else devices
    if devices == "auto":
        return len(gpus())
    if devices > len(gpus()):
        raise ConfigError(
            f"launcher.devices={devices}, but this machine has {len(gpus())} GPU{'s' * (len(gpus()) != 1)}; set "
            f"launcher.devices={len(gpus())}, or launcher.accelerator=cpu to rehearse."
        )
    return devices


def check_joined(config: RunConfig, accelerator: str, world_size: int, local_world_size: int) -> None:
    """What another launcher started must be what was asked for, and find a GPU for each of its ranks here."""
    if config.launcher.devices not in ("auto", world_size):
        raise ConfigError(
            f"launcher.devices={config.launcher.devices}, but the launcher outside started {world_size} ranks; "
            f"leave launcher.devices out."
        )
    if accelerator == "gpu" and local_world_size > len(gpus()):
        raise ConfigError(
            f"The launcher outside started {local_world_size} ranks on this machine, where each sees {len(gpus())} "
            f"GPUs; start as many as there are, and let each see all of them (srun --gpus-per-node)."
        )


def check_precision(config: RunConfig, accelerator: str) -> None:
    name, compute = config.precision.name, config.precision.compute
    if accelerator == "cpu" and compute == "float16":
        raise ConfigError(f"precision={name} needs a GPU (float16 with loss scaling); on CPU choose precision=bf16.")
    old = [gpu.name for gpu in gpus() if gpu.compute_capability < BFLOAT16_CAPABILITY]
    if accelerator == "gpu" and compute == "bfloat16" and old:
        raise ConfigError(
            f"precision={name} needs bfloat16, which {old[0]} does not have; "
            f"choose precision=fp16 optimizer.fused=false."
        )
    if compute == "float16" and config.optimizer.get("fused"):
        raise ConfigError(
            f"precision={name} scales the loss, and a fused optimizer unscales gradients inside its step, where they "
            f"can be neither clipped nor measured; set optimizer.fused=false."
        )


def on_host(config: RunConfig) -> bool:
    """Whether the optimizer is the one that works in host memory alone."""
    return str(config.optimizer.get("_target_")).endswith(".DeepSpeedCPUAdam")


def check_optimizer(config: RunConfig, accelerator: str) -> None:
    """DeepSpeed's optimizer for the CPU must find its state there."""
    if (
        on_host(config)
        and accelerator == "gpu"
        and config.strategy.get("offload", {}).get("optimizer", "none") == "none"
    ):
        raise ConfigError(
            f"optimizer={config.choices.get('optimizer')} works in host memory, but strategy="
            f"{config.strategy['name']} keeps the optimizer on the GPU; set strategy.offload.optimizer=cpu (a ZeRO "
            f"strategy has it), or choose optimizer=adamw."
        )


def check_looks(config: RunConfig, accelerator: str, world_size: int) -> None:
    """What is to be looked at must be there to be seen."""
    profile, debug = config.profile, config.debug
    if debug is not None and debug.name == "nan" and config.compile:
        raise ConfigError("debug=nan looks between the modules that compile=true joins; leave compile=true out.")
    if debug is not None and debug.name == "flight_recorder" and world_size == 1:
        raise ConfigError(
            f"debug=flight_recorder records what ranks send each other, and strategy={config.strategy['name']} has "
            f"one; leave debug out, or choose another strategy."
        )
    if profile is None:
        return
    if profile.name == "memory" and accelerator == "cpu":
        raise ConfigError(
            "profile=memory shows what CUDA's allocator does, and this run has none; on CPU choose profile=torch "
            "profile.memory=true."
        )
    if profile.name == "torch" and profile.first_step < 2:
        raise ConfigError("profile.first_step=1: the profiler warms up in the step before; set profile.first_step=2.")
    if profile.last_step > config.trainer.max_steps:
        raise ConfigError(
            f"profile.first_step={profile.first_step} profile.steps={profile.steps} end beyond trainer.max_steps="
            f"{config.trainer.max_steps}; set profile.first_step={max(2, config.trainer.max_steps - profile.steps + 1)}"
            f" or lower, or profile.steps=1."
        )
    if config.resume is None and not config.evidence:  # else the step that it goes on from decides
        last, traced = config.trainer.max_steps, config.trainer.trace_steps
        check_untraced(profile.disturbed, traced_steps(1, last, traced), last)


def check_checkpoint(config: RunConfig, strategy: Strategy) -> None:
    """What no checkpoint can hold is refused before a run relies on one."""
    if config.resume in (None, AUTO) and not config.checkpoint.asked:
        return
    reason = unsaved(strategy)
    if reason:
        keys = "checkpoint.every_steps, every_minutes, keep_best, at_end"
        raise ConfigError(f"{keys if config.checkpoint.asked else f'resume={config.resume}'}: {reason}")


def unsaved(strategy: Strategy) -> str | None:
    """What of a run no checkpoint can hold, and what to choose instead; None where there is nothing."""
    if strategy.unsaved:
        return (
            f"no checkpoint holds {strategy.unsaved}, which strategy={strategy.name} has; choose "
            f"strategy=zero3_offload."
        )
    return None


def check_vocabulary(config: RunConfig) -> None:
    """The model must have a row for every token that the data can hold."""
    net = config.model.get("net")
    tokens, rows = config.data.get("vocab_size"), net.get("vocab_size") if isinstance(net, dict) else None
    if isinstance(tokens, int) and isinstance(rows, int) and tokens > rows:
        raise ConfigError(
            f"model.net.vocab_size={rows} is smaller than data.vocab_size={tokens}; set model.net.vocab_size={tokens}."
        )


def accumulation(data: Data, data_ranks: int) -> int:
    """Micro-batches a data rank runs per optimizer step; ConfigError with the nearest batches that divide."""
    per_round = data.micro_batch_size * data_ranks
    if data.global_batch_size % per_round == 0:
        return data.global_batch_size // per_round
    below = data.global_batch_size // per_round * per_round
    nearest = " or ".join(str(size) for size in (below, below + per_round) if size)
    raise ConfigError(
        f"data.global_batch_size={data.global_batch_size} does not divide into data.micro_batch_size="
        f"{data.micro_batch_size} x {data_ranks} data ranks = {per_round}; set data.global_batch_size={nearest}"
        f"{smaller_micro_batch(data, data_ranks)}."
    )


def smaller_micro_batch(data: Data, data_ranks: int) -> str:
    """The largest smaller micro-batch that divides this global batch, as a further choice; empty if there is none."""
    if data.global_batch_size % data_ranks:
        return ""
    per_rank = data.global_batch_size // data_ranks
    size = next(size for size in range(min(data.micro_batch_size, per_rank), 0, -1) if per_rank % size == 0)
    return f", or data.micro_batch_size={size}"
