"""Proves agreement: trains one process and each strategy on the same samples, compares, and certifies."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from rich import box
from rich.console import Console
from rich.table import Table

from launch.compose import CONFIG_DIR, compose, quoted
from launch.dispatch import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, dispatch, load_resolved
from launch.entry import end_on_signals, one_line
from launch.job import resolve
from launch.schema import ConfigError, RunConfig, validate
from tracking.agreement import (
    Certificate,
    Draw,
    another_draw_matters,
    compare,
    other_micro_batches,
    tolerance_text,
)
from tracking.certified import subject_of
from tracking.evidence import Evidence
from tracking.record import RunRecord

# What a run that is made to be compared differs in from one that is made to be used.
VERIFY_OVERRIDES = ("trainer.max_steps=4", "trainer.val_every_steps=null", "logger=none", "evidence=true")


class RunFailedError(Exception):
    """A run that was to be compared did not finish."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that left evidence."""

    config: RunConfig
    record: RunRecord
    evidence: Evidence


def expand(overrides: list[str], multirun: bool) -> list[list[str]]:
    """Each job's overrides: with `multirun`, `strategy=ddp,zero1` stands for two jobs, as in Hydra's sweeps."""
    if not multirun:
        return [overrides]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        # The loader knows what glob(*) stands for.
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides)
        return product(parsed)


def product(parsed: list[Override]) -> list[list[str]]:
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line or ""]
        for override in parsed
    ]
    return [list(job) for job in itertools.product(*choices)]


def key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


class Verifier:
    """Runs references once for all candidates that share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[tuple[str, ...], tuple[Finished, Finished]] = {}  # exact and in the precision asked for

    def run(self, overrides: list[str], name: str) -> Finished:
        """Train one run in a folder of its own under `name`."""
        run_dir = self.folder / name
        words = [*VERIFY_OVERRIDES, *overrides, f"run_dir={quoted(run_dir)}"]
        status = dispatch(run_dir, name, lambda: compose(words))
        if status.state == "refused":
            raise ConfigError(status.error or "refused")
        if status.state != "completed":
            raise RunFailedError(f"{name}: {status.error}")
        return Finished(
            config=load_resolved(run_dir),
            record=RunRecord.read(run_dir / "record.json"),
            evidence=Evidence.load(run_dir),
        )

    def reference(self, overrides: list[str]) -> tuple[Finished, Finished]:
        """The exact and the reference run for a candidate's overrides, made once."""
        shared = tuple(
            word for word in overrides if not key(word).startswith(("strategy", "launcher.devices", "compile"))
        )
        if shared not in self.references:
            number = f"{len(self.references)}-" if self.references else ""
            exact = self.run([*without(shared, "precision"), "strategy=single", "precision=fp64"], f"{number}exact")
            self.references[shared] = exact, self.run([*shared, "strategy=single"], f"{number}reference")
        return self.references[shared]

    def certify(self, overrides: list[str], name: str) -> Certificate:
        """Compare the candidate that `overrides` describe with its references; the certificate lies in its folder."""
        resolve(validate(compose([*VERIFY_OVERRIDES, *overrides])))  # a mistake is told before references are trained
        exact, reference = self.reference(overrides)
        candidate = self.run(overrides, name)
        precision, data = candidate.config.precision, reference.config.data
        draws = [Draw(exact.evidence, reference.evidence)]
        checks = compare(draws, candidate.evidence, master=precision.master)
        for size in other_micro_batches(data["global_batch_size"], data["micro_batch_size"]):
            if not another_draw_matters(checks):
                break
            others = [word for word in overrides if key(word) != "data.micro_batch_size"]
            pair = self.reference([*others, f"data.micro_batch_size={size}"])
            draws.append(Draw(*(finished.evidence for finished in pair)))
            checks = compare(draws, candidate.evidence, master=precision.master)
        certificate = Certificate(
            verdict="agrees" if all(check.passed for check in checks) else "disagrees",
            strategy=candidate.record.strategy,
            world_size=candidate.record.world_size,
            model=str(candidate.config.choices.get("model")),
            data=str(candidate.config.choices.get("data")),
            precision=precision.name,
            steps=candidate.config.trainer.max_steps,
            checks=checks,
            tolerance=tolerance_text(precision.master),
            subject=subject_of(candidate.record.config, candidate.record.world_size),
            config_hash=candidate.config.hash,
            reference_config_hash=reference.config.hash,
            environment=candidate.record.environment.model_dump(),
        )
        path = self.folder / name / "certificate.json"
        certificate.write(path)
        if candidate.config.logger.mode != "disabled":
            from tracking import wandb_comparison  # W&B, which a second goes by in

            kept = [wandb_comparison.certificate(path, certificate.strategy)]
            try:
                wandb_comparison.log_artifacts(kept, candidate.config.logger, folder=path.parent)
            except Exception as error:  # noqa: BLE001  # the certificate is there, whatever becomes of its copy
                print(f"{path} is not in W&B: {type(error).__name__}: {error}", file=sys.stderr)
        return certificate


def without(overrides: tuple[str, ...], group: str) -> list[str]:
    """The overrides that neither choose in `group` nor reach into it."""
    return [word for word in overrides if key(word).partition(".")[0] != group]


def print_certificate(certificate: Certificate, console: Console) -> None:
    title = (
        f"{certificate.strategy} x {certificate.world_size} {certificate.verdict} with one process: "
        f"{certificate.model} on {certificate.data}, {certificate.precision}, {certificate.steps} optimizer steps"
    )
    columns = ("compared", "values", "worst at", "difference", "one process's own", "limit", "")
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for check in certificate.checks:
        figures = [f"{figure:.2e}" for figure in (check.difference, check.rounding, check.limit)]
        verdict = "ok" if check.passed else "DISAGREES"
        table.add_row(check.quantity, str(check.count), check.where, *figures, verdict)
    console.print(table)


def verify(arguments: list[str]) -> int:
    """`scripts/verify.py [-m] strategy=ddp [override ...]`: certify each candidate; 1 if any disagrees or fails."""
    multirun = bool({"-m", "--multirun"} & set(arguments))
    overrides = [word for word in arguments if word not in ("-m", "--multirun")]
    folders = [word.partition("=")[2] for word in overrides if key(word) == "run_dir"]
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    folder = Path(folders[0] if folders else f"runs/{stamp}-verify").resolve()
    end_on_signals()
    console = Console(width=None if sys.stdout.isatty() else 160)
    verifier, failed = Verifier(folder), 0
    try:
        jobs = expand([word for word in overrides if key(word) != "run_dir"], multirun)
        for number, job in enumerate(jobs):
            try:
                certificate = verifier.certify(job, f"{number}-candidate" if len(jobs) > 1 else "candidate")
            except (RunFailedError, ConfigError, HydraException) as error:
                if len(jobs) == 1 and not isinstance(error, RunFailedError):
                    raise
                print(f"{' '.join(job)}: {one_line(error)}", file=sys.stderr)
                failed += 1
                continue
            print_certificate(certificate, console)
            failed += certificate.verdict != "agrees"
    except (ConfigError, HydraException) as error:
        print(one_line(error), file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt as error:
        print(f"{error or 'interrupted by Ctrl-C'}; no process of the run is left.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"certificates in {folder}")
    return EXIT_FAILED if failed else 0
