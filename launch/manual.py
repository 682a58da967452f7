"""What a run may ask of a module that optimizes manually: it goes backward, clips, accumulates and steps by itself."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from launch.job import Job
from launch.schema import AUTO, ConfigError


def check_manual(job: Job, module: LightningModule) -> None:
    """ConfigError for what would be ignored without a word, or cannot be done; nothing of other modules."""
    if module.automatic_optimization:
        return
    config, kind = job.config, type(module).__name__
    if config.trainer.clip_norm is not None:
        raise ConfigError(
            f"trainer.clip_norm={config.trainer.clip_norm}: {kind} optimizes manually, so that nothing would clip; set "
            f"trainer.clip_norm=null, and call self.clip_gradients in {kind}.training_step."
        )
    if job.accumulation > 1:
        per_pass = job.data.micro_batch_size * job.mesh.data_ranks
        raise ConfigError(
            f"data.global_batch_size={job.data.global_batch_size}: {kind} optimizes manually, and takes data."
            f"micro_batch_size={job.data.micro_batch_size} x {job.mesh.data_ranks} data ranks at a time; set "
            f"data.global_batch_size={per_pass}, and accumulate in {kind}.training_step, or data.micro_batch_size="
            f"{job.data.global_batch_size // job.mesh.data_ranks}."
        )
    if config.trainer.on_nan == "skip":
        raise ConfigError(
            f"trainer.on_nan=skip: {kind} optimizes manually, and what it has stepped cannot be left out; set "
            f"trainer.on_nan=stop."
        )
    if config.precision.copies_master:
        raise ConfigError(
            f"precision={config.precision.name}: {kind} optimizes manually, and would clip and zero gradients of "
            f"weights whose wider copies are stepped; choose precision=bf16."
        )
    resumes = config.resume not in (None, AUTO)
    if config.checkpoint.asked or resumes:
        asked = f"resume={config.resume}" if resumes else "checkpoint.every_steps, every_minutes, keep_best, at_end"
        raise ConfigError(
            f"{asked}: {kind} optimizes manually, and a checkpoint holds the one optimizer that Lightning steps; leave "
            f"it out."
        )
