"""The grid's agreement: every preset and schedule, and the matrix of all spreads."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from tests.agreement import faults
from tests.agreement.cases import Case
from tests.agreement.grid_cases import CHOSEN, EVERYDAY, MATRIX, SCHEDULES, SWITCHES, GridCase, met_by
from tests.agreement.grid_faults import EVERYDAY_PLANTED, PLANTED
from tests.agreement.training import LEAST_EXCESS, checks_of, train_case
from tests.presets import PRESETS
from tests.tiers import in_tiers
from tracking.agreement import Check, Quantity

PRECISIONS = [
    GridCase(strategy="fsdp", precision="bf16", tied=True, accumulation=2),
    GridCase(strategy="fsdp", precision="bf16_pure"),
    GridCase(strategy="tensor", precision="bf16_master", accumulation=2),
    GridCase(strategy="2d_pipeline", precision="bf16", world_size=4, schedule="zbv", checkpointing="every_2"),
]


@pytest.mark.parametrize("case", in_tiers([*CHOSEN, *PRECISIONS], EVERYDAY), ids=str)
def test_grid_agrees_with_one_process(case: Case, tmp_path: Path, references: Callable) -> None:
    assert failed(checks_of(case, tmp_path, references)) == []


# The second step is the first whose loss shows an update; that more steps go on as these did is for the others to show.
FURTHER_SPREADS = [replace(case, steps=2) for case in MATRIX if case not in CHOSEN]


@pytest.mark.matrix
@pytest.mark.parametrize("case", FURTHER_SPREADS, ids=str)
def test_every_spread_agrees_with_one_process(case: Case, tmp_path: Path, references: Callable) -> None:
    assert failed(checks_of(case, tmp_path, references)) == []


COMPILED = [
    GridCase(strategy="fsdp", compile=True),
    GridCase(strategy="tensor", compile=True),
    GridCase(strategy="pipeline", compile=True),
]


@pytest.mark.matrix
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_blocks_agree_with_one_process(case: Case, tmp_path: Path, references: Callable) -> None:
    assert failed(checks_of(case, tmp_path, references)) == []


def failed(checks: list[Check]) -> list[Check]:
    assert {check.quantity for check in checks} == set(get_args(Quantity))
    return [check for check in checks if not check.passed]


def test_matrix_holds_every_preset_schedule_and_pair_of_switches() -> None:
    grids = {path.stem for path in PRESETS if "- _grid" in path.read_text()}
    for cases in (MATRIX, CHOSEN):
        assert {case.strategy for case in cases} == grids
        assert {case.schedule for case in cases} == set(SCHEDULES)
    assert {case.world_size for case in MATRIX} == {2, 4, 8}
    on_eight = [case for case in MATRIX if case.world_size == 8]
    for cases, (one, other) in itertools.product((MATRIX, on_eight), itertools.combinations(SWITCHES, 2)):
        wanted = set(itertools.product(SWITCHES[one], SWITCHES[other])) - {("vit", True)}
        assert wanted <= {(getattr(case, one), getattr(case, other)) for case in cases}, (one, other)
    shown = set().union(*map(met_by, MATRIX))
    for what, switch in itertools.product({*grids, *SCHEDULES}, SWITCHES.keys() - {"tied"}):
        assert {way for known, name, way in shown if (known, name) == (what, switch)} == set(SWITCHES[switch]), what


@pytest.mark.parametrize(
    ("fault", "case"), in_tiers(PLANTED, EVERYDAY_PLANTED), ids=lambda part: getattr(part, "__name__", str(part))
)
def test_planted_fault_is_caught(fault: type, case: Case, tmp_path: Path, references: Callable) -> None:
    checks = checks_of(case, tmp_path, references, fault)
    assert failed(checks) != []
    assert max(check.difference / check.limit if check.limit else check.difference for check in checks) > LEAST_EXCESS


def test_weights_let_go_before_their_gradients_end_the_run(tmp_path: Path) -> None:
    """Torch's own runtime goes on with wrong gradients here; see `Grid.check_schedule`, which refuses to start so."""
    case = GridCase(strategy="2d_pipeline", world_size=4, schedule="zbv")
    with pytest.raises(AssertionError, match="KeyError: <AccumulateGrad"):
        train_case(case.overrides, tmp_path, faults.ReshardedInBetween)


def test_parts_of_a_norms_gradient_that_are_not_summed_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="each tensor rank has a whole copy of parameter"):
        train_case(GridCase(strategy="tensor").overrides, tmp_path, faults.NormsPartNotSummed)
