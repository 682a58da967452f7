"""Every strategy computes what one process computes, and every planted fault is caught."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agreement import faults
from tests.agreement.cases import CHECKPOINTING_CASES, COMPILE_CASES, DDP_CASES, PRECISION_CASES, ZERO_CASES, Case
from tests.agreement.training import LEAST_EXCESS, checks_of
from tracking.evidence import Evidence

Train = Callable[..., Evidence]


# Where no earlier run has left compiled code, a compiler needs 20 s for a block of ours.
COMPILED = [pytest.param(case, marks=pytest.mark.slow) for case in COMPILE_CASES]


@pytest.mark.parametrize("case", [*DDP_CASES, *ZERO_CASES, *PRECISION_CASES, *CHECKPOINTING_CASES, *COMPILED], ids=str)
def test_strategy_agrees_with_one_process(case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references)
    assert [check for check in checks if not check.passed] == []
    assert {check.quantity for check in checks} == {"samples", "loss", "gradient norm", "weights", "validation loss"}


MANY = [case for case in DDP_CASES if case.world_size > 1 and case.precision == "fp32"]
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


@pytest.mark.parametrize(("fault", "case"), PLANTED, ids=lambda part: getattr(part, "__name__", str(part)))
def test_planted_fault_is_caught(fault: type, case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references, fault)
    excess = max(check.difference / check.limit if check.limit else check.difference for check in checks)
    assert [check.quantity for check in checks if not check.passed] != []
    assert excess > LEAST_EXCESS
