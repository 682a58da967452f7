"""From what a run may go on: which checkpoint `resume` means, and whether it is one of this run's kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.schema import ConfigError, RunConfig, leaves
from strategies.checkpoint import MANIFEST, Manifest, checkpoints

TRAINED = ("model", "data")  # sections that decide what is trained on what
STEPPED = ("model.optimizer.", "model.scheduler.")  # how it is trained may change on the way
# Keys that change no training sample and no weight.
FREE = {
    "model.net.loss_chunk_tokens",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
    "data.max_val_samples",
}


def resolve_resume(config: RunConfig) -> RunConfig:
    """The config with the very checkpoint that `resume` means; ConfigError if there is none that fits, or is whole."""
    if config.resume is None:
        return config
    folder = find(config.resume)
    try:
        manifest = Manifest.read(folder)
        manifest.check(folder)
    except ValueError as error:
        raise ConfigError(f"resume={config.resume}: {error}") from None
    check_same(manifest, config)
    if manifest.step >= config.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps={config.trainer.max_steps}, but resume={folder} lies behind {manifest.step} steps; "
            f"raise trainer.max_steps."
        )
    return config.model_copy(update={"resume": str(folder)})


def find(resume: str) -> Path:
    """The checkpoint folder that a user means: itself, or the newest of a run folder."""
    path = Path(resume).expanduser().resolve()
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise ConfigError(
            f"resume={resume} is no checkpoint, and no run folder with one; give a folder such as "
            f"runs/<day>/<time>/checkpoints/step-00000100."
        )
    return found[-1]


def check_same(manifest: Manifest, config: RunConfig) -> None:
    before, now = manifest.trained, json.loads(json.dumps(trained(config)))  # in the types that JSON has
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    differing = [key for key in differing if key not in {*FREE, *config.resume_despite}]
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:])} differ)" if differing[1:] else ""
        raise ConfigError(
            f"{key}={now.get(key)}, but the checkpoint was written with {key}={before.get(key)}{more}; give the same, "
            f"or resume_despite=[{','.join(differing)}]."
        )


def trained(config: RunConfig) -> dict[str, Any]:
    """By their dotted keys, the values that decide what is trained on what."""
    tree = config.model_dump()
    every = [pair for section in TRAINED for pair in leaves(tree[section], f"{section}.")]
    return {key: value for key, value in every if not key.startswith(STEPPED)}
