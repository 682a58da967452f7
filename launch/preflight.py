"""What takes torch to find out or to make before a run starts, in other processes: the dispatcher has no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate

from datamodules.spec import SampledData
from launch.failure import described, first_words, is_worded
from launch.job import Job, run_of
from launch.schema import ConfigError, RunConfig, validate
from launch.zygote import zygote_for
from strategies.grid import Grid

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def check_model(config: RunConfig, environment: Mapping[str, str]) -> None:
    """ConfigError if the model's plan lacks a part that the run needs, or there is no compiler to compile it with."""
    with tempfile.TemporaryFile("w+") as words:
        zygote = zygote_for(environment)
        fork = zygote.fork("preflight", config.model_dump_json(), environment=environment, stderr=words)
        try:
            code = fork.wait()
        except BaseException:  # an interrupt: the check ends, too
            zygote.close()
            raise
        if code:
            words.seek(0)
            raise ConfigError((words.read().strip().splitlines() or ["model: its plan could not be read"])[-1])


def build_extensions(names: Sequence[str], accelerator: str, environment: Mapping[str, str]) -> None:
    """Have C++ extensions built, with a word on the terminal if that takes time; ConfigError if it cannot be done."""
    answer = subprocess.run(
        [sys.executable, "-m", "strategies.engines.extensions", *names],
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "DS_ACCELERATOR": {"cpu": "cpu", "gpu": "cuda"}[accelerator]},
        check=False,
    )
    if answer.returncode:
        raise ConfigError((answer.stderr.strip().splitlines() or [f"{', '.join(names)} could not be built"])[-1])


def main(config_json: str) -> int:
    """Check the model of a resolved config, in a process that may import torch; an error's last line says why not."""
    try:
        check(Job.of(validate(json.loads(config_json))))
    except Exception as error:  # noqa: BLE001  # the model is the user's own code
        line = first_words(error) if is_worded(error) else f"model: its code raised {described(error)}"
        print(line, file=sys.stderr)
        return 1
    return 0


def check(job: Job) -> None:
    """ValueError if the model, or its plan, does not fit."""
    config, strategy = job.config, job.strategy
    from launch.guests import build_callbacks
    from launch.manual import check_manual
    from launch.worker import build_model
    from strategies.engines.construction import constructing
    from strategies.engines.extensions import check_compiler

    if config.compile and config.launcher.accelerator == "cpu":
        check_compiler("compile=true")
    model = build_model(config)
    build_callbacks(config, strategy)
    with constructing(model):
        model.configure_model()
    check_step(model)
    check_start(config, model)
    check_plan(job, model)
    check_manual(job, model)
    strategy.check_module(model, run_of(config, job.data, config.launcher.accelerator))
    if isinstance(strategy, Grid) and strategy.tensor > 1 and isinstance(job.data, SampledData):
        from launch.worker import first_sample
        from strategies.engines.rehearsal import rehearse

        rehearse(model, strategy, first_sample(job.data))


def check_step(model: LightningModule) -> None:
    """ConfigError if a step asks for samples in another way than a batch at a time."""
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    for step in ("training_step", "validation_step"):
        if is_param_in_hook_signature(getattr(model, step), "dataloader_iter", explicit=True):
            raise ConfigError(
                f"model: {type(model).__name__}.{step} takes dataloader_iter, and here steps are given one batch at a "
                f"time; let it take (batch, batch_idx)."
            )


def check_start(config: RunConfig, model: LightningModule) -> None:
    """ValueError if what the run starts from has other weights than the model."""
    if config.resume is not None:
        from strategies.engines.formats import check_shapes

        check_shapes(Path(config.resume), model)
        if "optimizer" in config.model and str(config.optimizer.get("_target_")).startswith("torch.optim."):
            from strategies.engines.checkpoint import check_kind

            check_kind(Path(config.resume), instantiate(config.optimizer, _convert_="all"))
    elif config.weights is not None:
        from launch.weights import StartingWeights

        StartingWeights(Path(config.weights), model, config.fitting)


def check_plan(job: Job, model: LightningModule) -> None:
    """ValueError if the model's plan lacks what the run asks of it."""
    config, strategy = job.config, job.strategy
    plan = getattr(model, "plan", None)
    if job.block_keys and not (plan and plan.blocks):
        raise ConfigError(
            f"{job.block_keys[0]} goes block by block, and model={config.choices.get('model')} has no plan.blocks; "
            f"give {type(model).__name__} a ParallelPlan with `blocks`, or leave the key out."
        )
    if not strategy.needs:
        return
    if plan is None:
        raise ConfigError(
            f"model={config.choices.get('model')} has no plan, which strategy={strategy.name} needs "
            f"({', '.join(sorted(strategy.needs))}); give {type(model).__name__} a `plan: ParallelPlan`."
        )
    plan.require(strategy.needs, type(model).__name__)
    net = model.get_submodule(plan.net)
    strategy.check_plan(plan, plan.expand(name for name, _ in net.named_modules()))
