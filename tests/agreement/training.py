"""Training a case on forked ranks, and what `verify` would say of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.fork import import_engine
from launch.job import Job, resolve
from launch.schema import validate
from launch.worker import build_model, on_meta, stats_of, train
from models.stats import ModelStats
from tests.agreement.cases import Case
from tests.composing import compose_fast
from tests.harness import run_ranks
from tracking.agreement import Check, Draw, another_draw_matters, compare, other_micro_batches
from tracking.evidence import Evidence
from tracking.record import RunRecord


def job_of(overrides: list[str], folder: Path) -> Job:
    job = Job.of(resolve(validate(compose_fast([*overrides, f"run_dir='{folder}'"]))))
    job.data.prepare()
    return job


def train_case(overrides: list[str], folder: Path, fault: type | None = None) -> Evidence:
    """The evidence of one run on forked ranks, with a fault planted if one is given."""
    job = job_of(overrides, folder)
    run_job(job, train_rank, job, fault, counted(job) if job.mesh.cuts else None)
    return Evidence.load(folder)


COUNTED: dict[str, ModelStats | None] = {}


def counted(job: Job) -> ModelStats | None:
    """Counts of a job's model, made once and not by each rank of each case."""
    data = {key: value for key, value in job.config.data.items() if not key.endswith("_batch_size")}
    key = json.dumps([job.config.model, data], default=str, sort_keys=True)
    if key not in COUNTED:
        COUNTED[key] = stats_of(on_meta(build_model(job.config)), job)
    return COUNTED[key]


def run_job(job: Job, function: Callable[..., Any], *args: Any) -> None:
    """Call `function(*args)` on each of a job's ranks, forked from here with all that they need imported."""
    import_engine(job)
    run_ranks(job.world_size, job.run_dir, function, *args)


def train_rank(job: Job, fault: type | None, stats: ModelStats | None) -> None:
    train(job, callbacks=[] if fault is None else [fault()], stats=stats)


def checks_of(case: Case, folder: Path, references: Callable, fault: type | None = None) -> list[Check]:
    """What `verify` would say of a case, further draws of its references among it."""
    candidate = train_case(case.overrides, folder, fault)
    check_formats(RunRecord.read(folder / "record.json"))
    sizes = [case.global_batch, *other_micro_batches(case.global_batch, case.global_batch)]
    draws: list[Draw] = []
    checks: list[Check] = []
    while sizes and (not draws or another_draw_matters(checks)):
        draws.append(references(case, sizes.pop(0)))
        checks = compare(draws, candidate, **case.formats)
    return checks


def disagreements(
    case: Case, folder: Path, references: Callable, *words: str, micro_batch_size: int | None = None
) -> list[Check]:
    """In what a case differs from one process, which takes micro-batches of `micro_batch_size` (None: all at once)."""
    candidate = train_case([*case.overrides, *words], folder)
    draw = references(case, micro_batch_size or case.global_batch)
    return [check for check in compare([draw], candidate, **case.formats) if not check.passed]


def check_formats(record: RunRecord) -> None:
    """The formats that were found in use, which the record holds, are those that were asked for."""
    assert vars(record.precision) == record.config["precision"]


# The limit is not tuned to the faults: each goes beyond it by at least this factor (repeated samples: by this many).
LEAST_EXCESS = 3
