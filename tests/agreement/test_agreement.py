"""DDP computes what one process computes, and every planted fault is caught."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from launch.compose import compose
from launch.job import Job, resolve
from launch.schema import validate
from launch.worker import train
from tests.agreement import faults
from tests.agreement.cases import CASES, Case
from tests.harness import run_ranks
from tracking.agreement import Check, compare
from tracking.evidence import Evidence

Train = Callable[..., Evidence]


def job_of(overrides: list[str], folder: Path) -> Job:
    job = Job.of(resolve(validate(compose([*overrides, f"run_dir='{folder}'"]))))
    job.data.prepare()
    return job


def train_case(overrides: list[str], folder: Path, fault: type | None = None) -> Evidence:
    """The evidence of one run on forked ranks, with a fault planted if one is given."""
    job = job_of(overrides, folder)
    run_ranks(job.world_size, folder, train_rank, job, fault)
    return Evidence.load(folder)


def train_rank(job: Job, fault: type | None) -> None:
    train(job, callbacks=[] if fault is None else [fault()])


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Evidence, Evidence]]:
    """(exact, reference) of a case, each trained once for all tests."""

    @cache
    def train_once(*overrides: str) -> Evidence:
        return train_case(list(overrides), tmp_path_factory.mktemp("reference"))

    return lambda case: (train_once(*case.exact_overrides), train_once(*case.reference_overrides))


def checks_of(case: Case, folder: Path, references: Callable, fault: type | None = None) -> list[Check]:
    candidate = train_case(case.overrides, folder, fault)
    exact, reference = references(case)
    return compare(exact, reference, candidate, master="float32")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ddp_agrees_with_one_process(case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references)
    assert [check for check in checks if not check.passed] == []
    assert {check.quantity for check in checks} == {"samples", "loss", "gradient norm", "weights", "validation loss"}


# The limit is not tuned to the faults: each goes beyond it by at least this factor (repeated samples: by this many).
LEAST_EXCESS = 10

MANY = [case for case in CASES if case.world_size > 1 and case.precision == "fp32"]
PLANTED = [
    *((faults.AveragedTwice, case) for case in MANY),
    *((faults.AccumulatedTwice, case) for case in CASES if case.accumulation > 1),
    *((faults.NotAveraged, case) for case in MANY),
    *((faults.ClippedByLocalNorm, case) for case in MANY if case.clip),
    *((faults.SamplesRepeated, case) for case in MANY),
    *((faults.OtherInitialWeight, case) for case in MANY),
    *((faults.StepSkipped, case) for case in MANY),
]


def test_cases_hold_every_pair_of_two_switches() -> None:
    switches: dict[str, list[object]] = {
        "model": ["gpt", "vit"],
        "optimizer": ["adamw", "sgd"],
        "clip": [True, False],
        "tied": [True, False],
        "accumulation": [1, 4],
        "world_size": [1, 2, 4],
    }
    for (one, values), (other, others) in itertools.combinations(switches.items(), 2):
        wanted = set(itertools.product(values, others))
        if {one, other} == {"model", "tied"}:
            wanted.remove(("vit", True))  # it has nothing to tie
        assert wanted <= {(getattr(case, one), getattr(case, other)) for case in CASES}, (one, other)


@pytest.mark.parametrize(("fault", "case"), PLANTED, ids=lambda part: getattr(part, "__name__", str(part)))
def test_planted_fault_is_caught(fault: type, case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references, fault)
    excess = max(check.difference / check.limit if check.limit else check.difference for check in checks)
    assert [check.quantity for check in checks if not check.passed] != []
    assert excess > LEAST_EXCESS
