"""Every strategy computes what one process computes, and every planted fault is caught."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from tests.agreement import faults
from tests.agreement.cases import (
    CHECKPOINTING_CASES,
    COMPILE_CASES,
    DDP_CASES,
    EVERYDAY,
    PRECISION_CASES,
    ZERO_CASES,
    Case,
)
from tests.agreement.grid_cases import EVERYDAY as EVERYDAY_GRID
from tests.agreement.grid_faults import ENDING
from tests.agreement.grid_faults import EVERYDAY_PLANTED as EVERYDAY_GRID_PLANTED
from tests.agreement.training import LEAST_EXCESS, checks_of
from tests.presets import PRESETS
from tests.tiers import in_tiers
from tracking.agreement import Quantity
from tracking.evidence import Evidence

Train = Callable[..., Evidence]


CASES = [*DDP_CASES, *ZERO_CASES, *PRECISION_CASES, *CHECKPOINTING_CASES, *COMPILE_CASES]


@pytest.mark.parametrize("case", in_tiers(CASES, EVERYDAY.values()), ids=str)
def test_strategy_agrees_with_one_process(case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references)
    assert [check for check in checks if not check.passed] == []
    assert {check.quantity for check in checks} == set(get_args(Quantity))


MANY = [DDP_CASES[number] for number in (0, 2, 3, 6)]  # each switch either way
ZERO_TWO_RANKS = [case for case in ZERO_CASES if case.world_size == 2]
PLANTED = [
    *((faults.AveragedTwice, case) for case in MANY),
    *((faults.AccumulatedTwice, case) for case in DDP_CASES if case.accumulation > 1),
    *((faults.NotAveraged, case) for case in MANY),
    *((faults.ClippedByLocalNorm, case) for case in MANY if case.clip),
    *((faults.SamplesRepeated, case) for case in MANY),
    *((faults.OtherInitialWeight, case) for case in MANY),
    *((faults.StepSkipped, case) for case in MANY),
    *((faults.DeepSpeedScalesAgain, case) for case in ZERO_CASES if case.accumulation > 1),
    *((faults.Summed, case) for case in ZERO_TWO_RANKS),
    *((faults.ShardNotStepped, case) for case in ZERO_TWO_RANKS),
    *((faults.SamplesRepeated, case) for case in ZERO_TWO_RANKS if case.strategy == "zero3"),
]


@pytest.mark.parametrize("cases", [DDP_CASES, ZERO_CASES], ids=["ddp", "zero"])
def test_cases_hold_every_pair_of_two_switches(cases: list[Case]) -> None:
    switches = ("strategy", "model", "optimizer", "clip", "tied", "accumulation", "world_size")
    values = {switch: {getattr(case, switch) for case in cases} for switch in switches}
    assert {switch for switch in switches[1:] if len(values[switch]) < 2} == set()
    for one, other in itertools.combinations(switches, 2):
        wanted = set(itertools.product(values[one], values[other]))
        if {one, other} == {"model", "tied"}:
            wanted.remove(("vit", True))  # it has nothing to tie
        assert wanted <= {(getattr(case, one), getattr(case, other)) for case in cases}, (one, other)


def test_cases_hold_every_format_of_every_engine() -> None:
    wanted = itertools.product(("ddp", "zero1", "zero3"), ("fp32", "bf16", "bf16_master", "bf16_pure"))
    assert set(wanted) <= {(case.strategy, case.precision) for case in CASES}


EVERYDAY_PLANTED = [
    *((fault, EVERYDAY["ddp"]) for fault in (faults.AveragedTwice, faults.AccumulatedTwice, faults.NotAveraged)),
    *((fault, EVERYDAY["ddp"]) for fault in (faults.ClippedByLocalNorm, faults.SamplesRepeated)),
    *((fault, EVERYDAY["ddp"]) for fault in (faults.OtherInitialWeight, faults.StepSkipped)),
    *((fault, EVERYDAY["zero2"]) for fault in (faults.DeepSpeedScalesAgain, faults.Summed, faults.ShardNotStepped)),
]


def test_everyday_cases_are_of_every_strategy_and_fault() -> None:
    presets = {path.stem for path in PRESETS}
    # zero3_nvme needs a library that not every machine has: test_zero_engine.py trains it where there is one.
    assert {*EVERYDAY, *(case.strategy for case in EVERYDAY_GRID)} == presets - {"zero3_nvme"}
    assert all(case.strategy == strategy for strategy, case in EVERYDAY.items())
    planted = {fault for fault, _ in (*EVERYDAY_PLANTED, *EVERYDAY_GRID_PLANTED)}
    known = {kind for kind in vars(faults).values() if isinstance(kind, type) and kind.__module__ == faults.__name__}
    assert planted | ENDING == known
    assert planted & ENDING == set()


@pytest.mark.parametrize(
    ("fault", "case"),
    in_tiers(PLANTED, EVERYDAY_PLANTED),
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_planted_fault_is_caught(fault: type, case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references, fault)
    excess = max(check.difference / check.limit if check.limit else check.difference for check in checks)
    assert [check.quantity for check in checks if not check.passed] != []
    assert excess > LEAST_EXCESS
