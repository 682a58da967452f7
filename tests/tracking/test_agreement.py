"""How a candidate is judged: by how far rounding alone takes one process, in one draw or in several."""

import numpy as np
import pytest

from tracking.agreement import (
    MARGIN,
    MORE_DRAWS,
    OUT_OF_REACH,
    Draw,
    another_draw_matters,
    compare,
    other_micro_batches,
)
from tracking.evidence import Evidence


def evidence(*, error: float = 0.0, weight: float = 0.0, sample: str = "a") -> Evidence:
    """A run whose scalars err by a relative `error`, and whose weights of norm 1 by an absolute `weight`."""
    return Evidence(
        samples=[[sample]],
        losses=[1.0 + error],
        gradient_norms=[[1.0 + error]],
        val_losses=[1.0 + error],
        weights=[{"net": np.array([1.0, weight])}],
    )


EXACT = evidence()
LUCKY = Draw(EXACT, evidence(error=1e-6, weight=1e-6))
TYPICAL = Draw(EXACT, evidence(error=5e-6, weight=5e-6))


def failed(draws: list[Draw], candidate: Evidence) -> list[str]:
    return [check.quantity for check in compare(draws, candidate, master="float32") if not check.passed]


def test_candidate_within_the_margin_of_one_draw_agrees() -> None:
    within = evidence(error=0.9 * MARGIN * 1e-6, weight=0.9 * MARGIN * 1e-6)
    assert failed([LUCKY], within) == []
    assert not another_draw_matters(compare([LUCKY], within, master="float32"))


def test_largest_of_all_draws_decides() -> None:
    beyond = evidence(error=2 * MARGIN * 1e-6, weight=2 * MARGIN * 1e-6)
    assert failed([LUCKY], beyond) == ["loss", "gradient norm", "weights", "validation loss"]
    assert another_draw_matters(compare([LUCKY], beyond, master="float32"))
    for draws in ([LUCKY, TYPICAL], [TYPICAL, LUCKY]):
        assert failed(draws, beyond) == []


def test_draw_is_measured_against_its_own_exact_run() -> None:
    """With other micro-batches, statistics of a BatchNorm are others: that is no rounding."""
    elsewhere = Draw(evidence(error=0.5, weight=0.5), evidence(error=0.5 + 1e-6, weight=0.5 + 1e-6))
    beyond = evidence(error=4 * MARGIN * 1e-6, weight=4 * MARGIN * 1e-6)
    assert set(failed([LUCKY, elsewhere], beyond)) == {"loss", "gradient norm", "weights", "validation loss"}


@pytest.mark.parametrize(
    "candidate",
    [
        evidence(weight=2 * OUT_OF_REACH * MARGIN * 1e-6),
        evidence(error=float("nan")),
        evidence(error=2 * MARGIN * 1e-6, sample="b"),
    ],
    ids=["far", "nan", "other-samples"],
)
def test_no_draw_is_asked_for_what_rounding_cannot_explain(candidate: Evidence) -> None:
    assert failed([LUCKY], candidate) != []
    assert not another_draw_matters(compare([LUCKY], candidate, master="float32"))


def test_further_draws_take_smaller_micro_batches_that_divide() -> None:
    assert other_micro_batches(32, 32) == [16, 8]
    assert other_micro_batches(24, 8) == [6, 4]
    assert other_micro_batches(8, 1) == [2]
    assert other_micro_batches(7, 1) == []
    assert all(len(other_micro_batches(64, size)) <= MORE_DRAWS for size in (1, 2, 4, 64))
