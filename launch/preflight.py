"""What takes torch to find out or to make before a run starts, in processes of their own: the dispatcher has no torch.

A model's plan is read by `python -m launch.preflight`, with the resolved config as JSON on stdin.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launch.job import Job
from launch.schema import ConfigError, RunConfig, validate


def check_model(config: RunConfig, environment: Mapping[str, str]) -> None:
    """ConfigError if the model's plan lacks a part that the run needs, or there is no compiler to compile it with."""
    answer = subprocess.run(
        [sys.executable, "-m", "launch.preflight"],
        input=config.model_dump_json(),
        capture_output=True,
        text=True,
        env=dict(environment),
        check=False,
    )
    if answer.returncode:
        raise ConfigError((answer.stderr.strip().splitlines() or ["model: its plan could not be read"])[-1])


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


def main() -> None:
    job = Job.of(validate(json.load(sys.stdin)))
    config, strategy = job.config, job.strategy
    from launch.worker import build_model
    from strategies.engines.extensions import check_compiler

    if config.compile and config.launcher.accelerator == "cpu":
        check_compiler("compile=true")
    model = build_model(config)
    model.configure_model()
    plan = getattr(model, "plan", None)
    if job.block_keys and not (plan and plan.blocks):
        raise ConfigError(
            f"{job.block_keys[0]} goes block by block, and model={config.choices.get('model')} has no plan.blocks; "
            f"give {type(model).__name__} a ParallelPlan with `blocks`, or leave the key out."
        )
    if plan is None:
        raise ConfigError(
            f"model={config.choices.get('model')} has no plan, which strategy={strategy.name} needs "
            f"({', '.join(sorted(strategy.needs))}); give {type(model).__name__} a `plan: ParallelPlan`."
        )
    plan.require(strategy.needs, type(model).__name__)
    net = model.get_submodule(plan.net)
    strategy.check_plan(plan, plan.expand(name for name, _ in net.named_modules()))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
