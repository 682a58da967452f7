"""Proves agreement: trains one process and each strategy on the same samples, compares, and certifies."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from rich import box
from rich.console import Console
from rich.table import Table

from launch.compose import CONFIG_DIR, compose
from launch.dispatch import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, dispatch, load_resolved
from launch.job import resolve
from launch.schema import ConfigError, RunConfig, validate
from launch.signals import end_on_signals
from launch.traces import missing, remove_empty
from launch.typed import quoted, read_words
from launch.wording import MISTAKES, one_line
from tracking.agreement import (
    MARGIN,
    UNIT_ROUNDOFF,
    Certificate,
    Draw,
    another_draw_matters,
    cause_of,
    compare,
    first_difference,
    other_micro_batches,
    tolerance_text,
)
from tracking.bisect import Parting, first_parting
from tracking.certified import setting_of, subject_of
from tracking.evidence import Evidence
from tracking.record import RunRecord

# Keys that may differ between candidates that share a reference.
NOT_SHARED = ("strategy", "launcher.devices", "compile", "data.micro_batch_size")

# What a run that is made to be compared differs in from one that is made to be used.
VERIFY_OVERRIDES = ("trainer.max_steps=4", "trainer.val_every_steps=null", "logger=none", "evidence=true")


FLAGS = ("-m", "--multirun", "--bisect")

Kind = Literal["exact", "reference", "exact_cut", "cut"]

CUTS: tuple[Kind, Kind] = ("exact_cut", "cut")


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

    def __init__(self, folder: Path, *, bisects: bool = False) -> None:
        """`bisects`: whether a candidate that disagrees is run once more, to find the module where it does so first."""
        self.folder, self.bisects = folder, bisects
        self.runs: dict[tuple[str, ...], tuple[Evidence, str]] = {}  # and the hash of its config
        self.failed: dict[tuple[str, ...], str] = {}  # why
        self.configs: dict[tuple[str, ...], RunConfig] = {}

    def run(self, overrides: list[str], name: str) -> Finished:
        """Train one run in a folder of its own under `name`."""
        run_dir = self.folder / name
        self.train(overrides, run_dir, name)
        return Finished(
            config=load_resolved(run_dir),
            record=RunRecord.read(run_dir / "record.json"),
            evidence=Evidence.load(run_dir),
        )

    def train(self, overrides: list[str], run_dir: Path, name: str) -> None:
        words = [*VERIFY_OVERRIDES, *overrides, f"run_dir={quoted(run_dir)}"]
        status = dispatch(run_dir, name, lambda: compose(words))
        if status.state == "refused":
            raise ConfigError(status.error or "refused")
        if status.state != "completed":
            raise RunFailedError(f"{name}: {status.error}")

    def first_draws(self, overrides: list[str], whole: int) -> tuple[list[Draw], list[str]]:
        """What a candidate is compared with at first, and what is to be said of that: one draw, or else several.

        Where something has no float64, such as grouped matrix products, the exact run is in the precision asked for,
        and what rounding does to it is seen by cutting its batches in other ways, each loss weighed by its targets.
        """
        try:
            return [self.draw(overrides, whole)], []
        except RunFailedError as error:
            if not re.search("double|float64", str(error), re.IGNORECASE):
                raise
        exact, _ = self.plain(overrides, "reference", micro_batch_size=whole)
        sizes = other_micro_batches(int(self.asked(overrides).data["global_batch_size"]), whole)
        draws = [Draw(exact, self.plain(overrides, "cut", micro_batch_size=size)[0]) for size in sizes]
        cuts = ", ".join(map(str, sizes))
        return draws, [
            f"the model has no float64: compared with {self.asked(overrides).precision.name} on whole batches, and "
            f"limits are from what cutting them does (micro-batches of {cuts})"
        ]

    def plain(self, overrides: list[str], kind: Kind, *, micro_batch_size: int) -> tuple[Evidence, str]:
        """What one process computes, as plain Lightning in float64 (`exact`) or as asked for (`reference`), or by
        Concord, which weighs the losses of the parts that a batch is cut into (`exact_cut` and `cut`).
        """
        shared = [word for word in overrides if not key(word).startswith(NOT_SHARED)]
        asked = self.asked(overrides)
        if kind.startswith("exact"):
            shared = [*without(shared, "precision"), "precision=fp64"]
        # Lightning has nothing that steps a wider copy of the weights: one process of Concord's does.
        way = "true" if kind.endswith("cut") or (kind == "reference" and asked.precision.copies_master) else "plain"
        words = (*shared, "strategy=single", f"evidence={way}", f"data.micro_batch_size={micro_batch_size}")
        if "module" not in asked.data and not asked.data.get("val_batch_size"):
            # A mean that a module takes over a batch counts as its own, here as there.
            words = (*words, f"data.val_batch_size={asked.data['micro_batch_size']}")
        if "module" in asked.data:  # whose loader keeps the batch size that it has
            words = (*words, f"++data.loader_batch_size={loader_batch_size(asked)}")
        if words in self.failed:
            raise RunFailedError(self.failed[words])
        if words not in self.runs:
            number = sum(run.name.split("-")[0] == kind for run in self.folder.glob("*"))
            name = f"{kind}-{number}" if number else kind
            try:
                self.train(list(words), self.folder / name, name)
            except RunFailedError as error:
                self.failed[words] = str(error)
                raise
            self.runs[words] = Evidence.load(self.folder / name), load_resolved(self.folder / name).hash
        return self.runs[words]

    def asked(self, overrides: list[str]) -> RunConfig:
        """The config of a candidate, composed once: Hydra takes a quarter of a second for it."""
        words = tuple(overrides)
        if words not in self.configs:
            self.configs[words] = validate(compose([*VERIFY_OVERRIDES, *overrides]))
        return self.configs[words]

    def draw(self, overrides: list[str], micro_batch_size: int) -> Draw:
        """The exact and the reference run for a candidate's overrides, on micro-batches of a size."""
        exact, _ = self.plain(overrides, "exact", micro_batch_size=micro_batch_size)
        reference, _ = self.plain(overrides, "reference", micro_batch_size=micro_batch_size)
        return Draw(exact, reference)

    def certify(self, overrides: list[str], name: str) -> Certificate:
        """Compare the candidate that `overrides` describe with its references; the certificate lies in its folder."""
        asked = self.asked(overrides)
        resolve(asked)  # a mistake is told before references are trained
        whole, micro = int(asked.data["global_batch_size"]), int(asked.data["micro_batch_size"])
        draws, conditions = self.first_draws(overrides, whole)
        conditions += conditions_of(draws[0].exact, micro)
        is_random = bool(draws[0].exact.traits["draws"]) and whole != micro
        is_manual = bool(draws[0].exact.traits["manual"])  # then no process can take a batch in parts
        if is_random and is_manual:
            raise RunFailedError(
                f"{name}: model={asked.choices.get('model')} optimizes manually and draws at random, so that one "
                f"process draws other numbers than {whole // micro}; certify it without its noise"
            )
        if is_random:
            draws, _ = self.first_draws(overrides, micro)
            whole = micro
        candidate = self.run(overrides, name)
        precision, in_float64 = candidate.config.precision, len(draws) == 1
        checks = compare(draws, candidate.evidence, master=precision.master, parameter=precision.parameter)
        for size in other_micro_batches(int(asked.data["global_batch_size"]), whole):
            if is_manual or not in_float64 or not another_draw_matters(checks):
                break
            draws.append(self.draw(overrides, size))
            checks = compare(draws, candidate.evidence, master=precision.master, parameter=precision.parameter)
        passed = all(check.passed for check in checks)
        if is_random and not passed:
            # It may be a mean over targets, too, of which Lightning would take the mean of means.
            exact, reference = (self.plain(overrides, cut, micro_batch_size=micro)[0] for cut in CUTS)
            weighed = [Draw(exact, reference)]
            again = compare(weighed, candidate.evidence, master=precision.master, parameter=precision.parameter)
            if all(check.passed for check in again):
                passed, checks = True, again
                conditions.append(
                    "its loss is a mean over targets, of which micro-batches have unlike numbers: compared with one "
                    "process of Concord, which weighs them so that the mean is the whole batch's"
                )
        cause = ""
        if not passed:
            kind: Kind = "exact" if in_float64 else "reference"
            cut = self.plain(overrides, kind, micro_batch_size=micro)[0] if whole != micro and not is_manual else None
            cause = cause_of(checks, draws, cut, candidate.evidence, parts=parts_of(candidate))
            if self.bisects and in_float64 and not is_manual:
                cause += " " + self.bisected(overrides, name, draws, candidate)
        certificate = Certificate(
            verdict="agrees" if passed else "disagrees",
            strategy=candidate.record.strategy,
            world_size=candidate.record.world_size,
            model=str(candidate.config.choices.get("model")),
            data=str(candidate.config.choices.get("data")),
            precision=precision.name,
            steps=candidate.config.trainer.max_steps,
            checks=checks,
            conditions=conditions,
            cause=cause,
            tolerance=tolerance_text(precision.master),
            setting=setting_of(candidate.record),
            subject=subject_of(candidate.record),
            config_hash=candidate.config.hash,
            reference_config_hash=self.plain(overrides, "reference", micro_batch_size=whole)[1],
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

    def bisected(self, overrides: list[str], name: str, draws: list[Draw], candidate: Finished) -> str:
        """Where in the first step that differs the candidate does so, by what its modules give in it, in words."""
        step, _ = first_difference(draws, candidate.evidence)
        words = [*overrides, f"evidence_step={step}"]
        micro = int(candidate.config.data["micro_batch_size"])
        parts = candidate.config.strategy.get("micro_batches", 1) if candidate.record.mesh.pipe > 1 else 1
        size = max(1, micro // int(parts))
        master = candidate.config.precision.master
        exact, reference = (self.plain(words, kind, micro_batch_size=size)[0] for kind in ("exact", "reference"))
        again = self.run(words, f"{name}-step-{step}").evidence
        return first_parting(exact, reference, again, step, Parting(MARGIN, UNIT_ROUNDOFF[master]))


def loader_batch_size(config: RunConfig) -> int:
    """What the training loader of a data module of the user's own has to have as batch_size."""
    return int(config.data.get("loader_batch_size") or config.data["micro_batch_size"])


def conditions_of(exact: Evidence, micro_batch_size: int) -> list[str]:
    """What is said of how the runs were made, so that they could be compared."""
    conditions = []
    if exact.traits["dropout"]:
        places = ", ".join(dict.fromkeys(exact.traits["dropout"][:3]))
        conditions.append(f"dropout is switched off ({places}): every way to cut a batch draws another mask")
    if exact.traits["draws"]:
        conditions.append(
            f"the step draws at random: plain Lightning took micro-batches of {micro_batch_size} samples, with the "
            f"candidate's seeds"
        )
    return conditions


def parts_of(candidate: Finished) -> dict[str, int]:
    """Numbers by which a gradient may have been multiplied, or divided, by mistake."""
    batch = candidate.record.batch
    return {
        "ranks": candidate.record.world_size,
        "data ranks": candidate.record.mesh.data,
        "micro-batches of a rank": batch.accumulation,
        "micro-batches of a step": batch.global_ // batch.micro,
    }


def without(overrides: list[str], group: str) -> list[str]:
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
    for line in [*certificate.conditions, *([certificate.cause] if certificate.cause else [])]:
        console.print(f"  {line}", highlight=False)


def verify(arguments: list[str]) -> int:
    """`scripts/verify.py [-m] [--bisect] strategy=ddp [override ...]`: certify each; 1 if any disagrees or fails."""
    try:
        words = read_words(arguments, dict.fromkeys(FLAGS, 0))
    except ConfigError as error:
        print(one_line(error), file=sys.stderr)
        return EXIT_REFUSED
    multirun = bool({"-m", "--multirun"} & set(words))
    overrides = [word for word in words if word not in FLAGS]
    folders = [word.partition("=")[2].strip("'") for word in overrides if key(word) == "run_dir"]
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
    folder = Path(folders[0] if folders else f"runs/{stamp}-verify").resolve()
    made = missing(folder)
    end_on_signals()
    console = Console(width=None if sys.stdout.isatty() else 160)
    verifier, failed = Verifier(folder, bisects="--bisect" in arguments), 0
    try:
        jobs = expand([word for word in overrides if key(word) != "run_dir"], multirun)
        for number, job in enumerate(jobs):
            try:
                certificate = verifier.certify(job, f"{number}-candidate" if len(jobs) > 1 else "candidate")
            except (RunFailedError, *MISTAKES) as error:
                if len(jobs) == 1 and not isinstance(error, RunFailedError):
                    raise
                print(f"{' '.join(job)}: {one_line(error)}", file=sys.stderr)
                failed += 1
                continue
            print_certificate(certificate, console)
            failed += certificate.verdict != "agrees"
    except MISTAKES as error:
        print(one_line(error), file=sys.stderr)
        remove_empty(made)
        return EXIT_REFUSED
    except KeyboardInterrupt as error:
        print(f"{error or 'interrupted by Ctrl-C'}; no process of the run is left.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"certificates in {folder}")
    return EXIT_FAILED if failed else 0
