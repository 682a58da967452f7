"""What `python train.py` does around Hydra: one line for a mistake, one exit code, one table after a sweep."""

import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.attempts import earlier_status, earlier_trees
from launch.compose import tree_of
from launch.dispatch import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, dispatch
from launch.schema import AUTO, ConfigError
from launch.search import found_best
from launch.signals import TerminatedError, end_on_signals
from launch.sweep import SweepTable, print_sweep
from launch.traces import remove_empty
from launch.typed import quoted, read_words
from launch.wording import MISTAKES, one_line
from tracking.curve import losses_of, time_to
from tracking.report import print_runs
from tracking.sources import Run, read_run
from tracking.status import RunStatus

exit_codes: list[int] = []  # of the runs that this process dispatched


def run_job(config: DictConfig) -> float:
    """Hydra's task: dispatch one run; its validation loss, or NaN if there is none.

    Never raises for a run that fails: Hydra would end the sweep's bookkeeping there, and status.json tells more.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    OmegaConf.set_struct(config, False)
    status = None
    again = config.pop("resume_sweep") is not None
    if again:
        status = earlier(run_dir)
        if any(earlier_trees(run_dir)):  # else no attempt has begun: the job's own `resume` is what it starts from
            config.resume = AUTO
    if config.get("hparams") is not None and hydra.mode != RunMode.MULTIRUN:
        print(f"hparams={hydra.runtime.choices['hparams']} searches by several runs; add -m.", file=sys.stderr)
        exit_codes.append(EXIT_REFUSED)
        return math.nan
    if status is None:
        prepare_tree(config, hydra, run_dir)
        name = str(OmegaConf.select(config, "strategy.name"))
        status = dispatch(run_dir, name, lambda: tree_of(config, hydra), again=again or config.resume == AUTO)
    tell_run(status, run_dir, config.expect, in_sweep=hydra.mode == RunMode.MULTIRUN)
    exit_codes.append(status.exit_code or 0)
    if status.state != "completed":
        return math.nan
    try:
        return objective(read_run(run_dir), str(config.objective.name), config.objective.loss)
    except ValueError as error:
        if config.get("hparams") is not None:
            print(f"{run_dir.name}: {error}; the trial counts as failed.", file=sys.stderr)
        return math.nan


def tell_run(status: RunStatus, run_dir: Path, expect: Mapping[str, Any] | None, *, in_sweep: bool) -> None:
    """Say what became of a run; of a sweep's the table at its end says the rest."""
    if status.error:
        print(f"{run_dir.name + ': ' if in_sweep else ''}{status.error}", file=sys.stderr)
    dumps = run_dir / "flight_recorder" / "dumps"
    if status.state == "failed" and dumps.exists():
        print(f"what each rank has sent: {dumps.parent}; compare the ranks by `torchfrtrace {dumps} --prefix rank`")
    if status.state == "completed" and not in_sweep:
        print_runs([read_run(run_dir)])
        if expect is not None:
            print("the recipe expects " + ", ".join(f"{key} {value}" for key, value in expect.items()))


def prepare_tree(config: DictConfig, hydra: Any, run_dir: Path) -> None:
    """Write into the config what only Hydra knows: the run's folder, and the sweep as its group."""
    OmegaConf.update(config, "run_dir", str(run_dir))
    if hydra.mode == RunMode.MULTIRUN and OmegaConf.select(config, "logger.group") is None:
        OmegaConf.update(config, "logger.group", "-".join(Path(hydra.sweep.dir).resolve().parts[-2:]))


def earlier(run_dir: Path) -> RunStatus | None:
    """Of a resumed sweep's job: its status if it completed, else None."""
    status = earlier_status(run_dir)
    if status is not None and status.state == "completed":
        return status
    return None


def objective(run: Run, name: str, loss: float | None) -> float:
    """What a sweeper minimises of a run that completed; ValueError if the run does not have it."""
    assert run.record is not None
    if name == "time_to_loss":
        losses = losses_of(run)
        seconds = time_to(losses, loss)
        if seconds is None:
            lowest = min(losses.train.values, default=math.nan)
            raise ValueError(f"objective.loss={loss} was not reached (lowest training loss: {lowest:.4g})")
        return seconds
    results = run.record.results
    value = results.val_loss if name == "val_loss" else results.step_ms_p50
    if value is None or not math.isfinite(value):
        raise ValueError(f"objective={name}: the run has none (steps={results.steps}, {name}={value})")
    return value


def resumed_argv(argv: list[str]) -> list[str]:
    """`resume_sweep=<folder>` replaced by the overrides that the sweep in that folder was started with."""
    words = [word for word in argv[1:] if word.startswith("resume_sweep=")]
    if not words:
        return argv
    folder = words[0].partition("=")[2].strip("'")
    sweep_dir = Path(folder).expanduser().resolve()
    settings = sweep_dir / "multirun.yaml"
    if not settings.exists():
        raise ConfigError(f"resume_sweep={folder} is not the folder of a sweep (no multirun.yaml in it).")
    if set(argv[1:]) - {"-m", "--multirun", words[0]}:
        raise ConfigError("resume_sweep takes the sweep's own overrides and no others; leave the others out.")
    overrides = yaml.safe_load(settings.read_text())["hydra"]["overrides"]
    hydra_overrides = [word for word in overrides["hydra"] if not word.startswith(("hydra.sweep.dir=", "hydra.mode="))]
    return [
        argv[0],
        "--multirun",
        *overrides["task"],
        *hydra_overrides,
        f"hydra.sweep.dir={quoted(sweep_dir)}",
        f"resume_sweep={quoted(sweep_dir)}",
    ]


def run_application(application: Callable[[], None]) -> int:
    """Run the Hydra application; its exit code, after one line on stderr for whatever went wrong."""
    end_on_signals()
    interrupted = refused = 0
    try:
        sys.argv = resumed_argv([sys.argv[0], *read_words(sys.argv[1:])])
        application()
    except KeyboardInterrupt as error:
        interrupted = say_interrupted(error)
    except BrokenPipeError:  # `--help | head`: who reads has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # what is left is not written at exit either
        return 0
    except MISTAKES as error:
        print(one_line(error), file=sys.stderr)
        refused = EXIT_REFUSED
    if EXIT_REFUSED in (refused, *exit_codes):
        remove_empty(SweepTable.made)
    folder = SweepTable.folder
    if folder is None or not folder.is_dir() or (refused and not exit_codes):  # else there is a sweep to be told of
        return interrupted or refused or max(exit_codes, default=0)
    try:
        code = tell_sweep(folder)
    except KeyboardInterrupt as error:
        return say_interrupted(error)
    return interrupted or (EXIT_FAILED if refused else code)


def say_interrupted(error: KeyboardInterrupt) -> int:
    """Say what ended this process; its exit code."""
    with suppress(OSError):  # the terminal may be what has ended
        print(f"{error or 'interrupted by Ctrl-C'}; no process of the run is left.", file=sys.stderr)
    return error.exit_code if isinstance(error, TerminatedError) else EXIT_INTERRUPTED


def tell_sweep(folder: Path) -> int:
    """Say what became of a sweep's jobs, and of a search; the exit code that this makes."""
    failed = print_sweep(folder)
    has_best = found_best(folder)
    if has_best is not None:
        return 0 if has_best else EXIT_FAILED
    return EXIT_FAILED if failed or any(exit_codes) else 0
