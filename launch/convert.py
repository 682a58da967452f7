"""Checkpoints in the formats of others, and weights of others as checkpoints."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from launch.dispatch import load_resolved
from launch.restore import stand_at
from launch.schedule import plain, restore_schedule
from launch.schema import ConfigError, RunConfig
from launch.worker import build_model, quiet
from strategies.checkpoint import MANIFEST, PARTIAL, Manifest
from strategies.engines.checkpoint import Reader
from strategies.engines.formats import described, read_pickled, read_whole, to_checkpoint, to_safetensors
from strategies.engines.groups import put_back
from strategies.engines.universal import fill, give_storage, to_universal
from strategies.fitting import Rename, renamed, renamer
from strategies.weights import Source, averages_of, check_weights, find_weights, weights_of

SUFFIXES = {"safetensors": ".safetensors", "lightning": ".ckpt"}  # of the formats that are one file
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
GIB = 2**30
# Where classes and functions may come from that a run folder, which anybody may have written, has us call.
PACKAGES = ("models", "torch.optim", "deepspeed.ops.adam")


def convert_to(
    kind: str,
    source: Path,
    out: Path,
    *,
    shard_gib: float | None,
    rename: Sequence[str],
    trust: bool,
    average: bool = False,
) -> None:
    """Write the checkpoint `source`, or a run's newest, to `out` in another format; ConfigError if it cannot be.

    With `average`, the moving average of the weights is written in their place.
    """
    if average and kind != "safetensors":
        raise ConfigError(f"--weights ema: --to {kind} is for all of a run, to go on with; use --to safetensors.")
    if shard_gib is not None and (kind != "safetensors" or not shard_gib > 0):
        raise ConfigError(f"--shard-gib={shard_gib:g}: give a number above 0, and --to safetensors.")
    suffix = SUFFIXES.get(kind)
    if suffix and shard_gib is None and out.suffix != suffix:
        raise ConfigError(f"{out}: --to {kind} writes one file; give it a name that ends in {suffix}.")
    if rename and kind == "lightning":
        raise ConfigError("--rename: Lightning loads a model by its own names; leave --rename out.")
    folder = find_weights(source.expanduser().resolve())
    with making(out) as partial:
        check_weights(folder)
        if kind == "safetensors":
            found = averages_of(folder) if average else weights_of(folder)
            to_safetensors(found, partial, by_prefix(rename), None if shard_gib is None else shard_gib * GIB)
            return
        trained = whole_checkpoint(folder, kind)
        trainer = trainer_at(trained, trust=trust)
        if kind == "lightning":
            save_lightning(trained, trainer, partial)
            return
        schedules = [plain(config.scheduler) for config in trainer.lr_scheduler_configs]
        module, optimizer = trainer.lightning_module, trainer.optimizers[0]
        to_universal(trained, module, optimizer, (*schedules, None)[0], partial, by_prefix(rename))


def by_prefix(pairs: Sequence[str]) -> Rename:
    """How the pairs of --rename rename."""
    return renamer(pairs, "=", "--rename")


def convert_from(source: Path, out: Path, *, rename: Sequence[str]) -> None:
    """Write plain weights to `out` as a checkpoint; ConfigError if they are none, or more than tensors."""
    path = source.expanduser().resolve()
    if path.suffix in PICKLED and path.is_file():
        weights = read_pickled(path)
        names = renamed(weights, by_prefix(rename), "--rename")
        with making(out) as partial:
            tensors = described({new: weights[old] for new, old in names.items()})
            to_checkpoint(tensors, lambda new: weights[names[new]], partial)
        return
    if path.is_file() and path.suffix != ".safetensors":
        raise ConfigError(f"--from {source}: give a file of {', '.join(PICKLED)} or .safetensors, or a folder.")
    found = find_weights(path)
    with making(out) as partial:
        check_weights(found)
        folder, manifest = weights_of(found)
        names = renamed((name.removeprefix("weight/") for name in manifest.tensors), by_prefix(rename), "--rename")
        tensors = {new: manifest.tensors[f"weight/{old}"] for new, old in names.items()}
        with Reader(folder, manifest) as reader:
            to_checkpoint(tensors, lambda new: read_whole(reader, f"weight/{names[new]}"), partial)


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A path to write to, which is called `out` when all of it is there; of what fails, nothing is left."""
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another name.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + PARTIAL)
    remove(partial)
    try:
        yield partial
        partial.rename(out)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def whole_checkpoint(folder: Path, kind: str) -> Source:
    """A checkpoint with the optimizer's state; ConfigError for weights alone."""
    source = Source(folder, Manifest.read(folder)) if (folder / MANIFEST).is_file() else None
    if source is None or source.manifest.step == 0:
        raise ConfigError(f"{folder} holds weights alone, and --to {kind} is for all of a run; use --to safetensors.")
    return source


def trainer_at(source: Source, *, trust: bool) -> Trainer:
    """A Trainer of one process where the checkpoint's run was; model and optimizer are there, yet without values."""
    run_dir = source.folder.parent.parent
    if not (run_dir / "resolved.yaml").is_file():
        raise ConfigError(
            f"{source.folder}: {run_dir} has no resolved.yaml, which says what model it is of; put it back."
        )
    config = load_resolved(run_dir)
    if not trust:
        check_targets(config.model, run_dir)
    quiet()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=micro_batches(config),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    model = build_model(config)
    model.configure_model()
    give_storage(model)
    connect(trainer, model)
    put_back(trainer.optimizers[0], source.manifest.groups)
    for scheduler, state in zip(trainer.lr_scheduler_configs, source.manifest.schedulers, strict=True):
        restore_schedule(scheduler.scheduler, state)
    stand_at(trainer, source.manifest.step)
    return trainer


def micro_batches(config: RunConfig) -> int:
    """Micro-batches that one process runs per optimizer step."""
    return int(config.data["global_batch_size"]) // int(config.data["micro_batch_size"])


def connect(trainer: Trainer, model: LightningModule) -> None:
    """What `Trainer.fit` does before it trains, as far as a checkpoint shows it."""
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer.strategy.setup_optimizers(trainer)
    if len(trainer.optimizers) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(trainer.optimizers)} optimizers, and of such no run is saved."
        )


def check_targets(section: object, run_dir: Path, key: str = "model") -> None:
    """ConfigError if building a model would call anything but the models and optimizers that are known here.

    Hydra resolves what OmegaConf interpolates when it builds, so that a string could become a `_target_` only then: of
    such a resolved config has none. YAML knows pairs, too, which are tuples to us and lists to OmegaConf.
    """
    if isinstance(section, str) and "${" in section:
        raise ConfigError(
            f"{run_dir / 'resolved.yaml'} leaves {key[:100]!r} open, as {section[:100]!r}, which no resolved config "
            f"does; if you know who wrote it, add --trust."
        )
    if isinstance(section, Mapping):
        target = section.get("_target_")
        check_targets(target, run_dir, f"{key}._target_")
        if target is not None and not is_known(str(target)):
            raise ConfigError(
                f"{run_dir / 'resolved.yaml'} calls {str(target)[:100]!r}, which is neither in models/ nor an "
                f"optimizer of torch; if you know who wrote it, add --trust."
            )
        for name, value in section.items():
            check_targets(value, run_dir, f"{key}.{name}")
    if isinstance(section, list | tuple):
        for number, value in enumerate(section):
            check_targets(value, run_dir, f"{key}.{number}")


def is_known(target: str) -> bool:
    """Whether something is defined in one of our packages, and not merely imported there."""
    module, _, name = target.rpartition(".")
    if not any(f"{module}.".startswith(f"{package}.") for package in PACKAGES):
        return False
    try:
        if importlib.util.find_spec(module) is None:
            return False
    except ModuleNotFoundError:
        return False
    found = getattr(importlib.import_module(module), name, None)
    home = getattr(found, "__module__", None) or ""
    return callable(found) and any(f"{home}.".startswith(f"{package}.") for package in PACKAGES)


def save_lightning(source: Source, trainer: Trainer, path: Path) -> None:
    """Write what `Trainer.save_checkpoint` would have written, of tensors and plain values alone."""
    with Reader(*source) as reader:
        fill(reader, trainer.lightning_module, trainer.optimizers[0])
    state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    kept = {key: value for key, value in state.get("hyper_parameters", {}).items() if is_plain(value)}
    torch.save({key: value for key, value in state.items() if key != "hparams_type"} | {"hyper_parameters": kept}, path)
    torch.load(path, weights_only=True, mmap=True)


def is_plain(value: Any) -> bool:
    """Whether torch loads it without running anything."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return isinstance(value, int | float | str | bool | type(None))
