"""A run that was saved under one strategy and goes on under another is the run that one process would have made."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from strategies.checkpoint import checkpoints, folder_of
from tests.agreement.cases import Case, own
from tests.agreement.free_cases import FREE, RESIZED, SAVED, FreeCase, same
from tests.agreement.grid_cases import GridCase
from tests.agreement.training import train_case
from tests.tiers import in_tiers
from tracking.agreement import Draw, compare
from tracking.evidence import Evidence

# Every strategy is left for another and resumed from another, and from every kind of engine a run goes on under every
# other: a checkpoint does not say to a reader who wrote it, so that a pair of strategies shows no more than its kinds.
RING = list(itertools.pairwise([*FREE, "single"]))
KINDS = ["ddp", "zero2", "zero3", "fsdp", "tensor", "pipeline", "3d"]
# One pair for each two of the families of engines: data-parallel, DeepSpeed's, and the grid's.
EVERYDAY = [("ddp", "zero3"), ("zero3", "pipeline"), ("pipeline", "ddp")]
SAME = ("ddp", "zero3", "pipeline")


def marks_of(first: str, second: str) -> list[pytest.MarkDecorator]:
    if (first, second) in EVERYDAY:
        return []
    return [pytest.mark.full if (first, second) in RING else pytest.mark.matrix]


OF_KINDS = itertools.permutations(KINDS, 2)
RESIZED_SELVES = ((strategy, strategy) for strategy in RESIZED)
PAIRS = [
    pytest.param(first, second, marks=marks_of(first, second))
    for first, second in dict.fromkeys([*EVERYDAY, *RING, *OF_KINDS, *RESIZED_SELVES])
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Evidence]]:
    """Run folder and evidence of an uninterrupted run of a strategy, saved on the way."""
    runs: dict[str, tuple[Path, Evidence]] = {}

    def run(strategy: str) -> tuple[Path, Evidence]:
        if strategy not in runs:
            folder = tmp_path_factory.mktemp("saved") / "run"
            words = [*FREE[strategy].overrides, f"checkpoint.every_steps={SAVED}"]
            runs[strategy] = folder, train_case(words, folder)
        return runs[strategy]

    return run


def resumed(run_dir: Path, case: FreeCase, folder: Path) -> Evidence:
    return train_case([*case.overrides, f"resume='{folder_of(run_dir, SAVED)}'"], folder)


def joined(before: Evidence, after: Evidence) -> Evidence:
    """The history of a run that was interrupted."""
    return Evidence(
        samples=before.samples[:SAVED] + after.samples,
        losses=before.losses[:SAVED] + after.losses,
        gradient_norms=before.gradient_norms[:SAVED] + after.gradient_norms,
        val_losses=after.val_losses,
        weights=after.weights,
    )


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_what_one_strategy_saves_another_goes_on_with(
    first: str, second: str, tmp_path: Path, saved: Callable, references: Callable
) -> None:
    run_dir, before = saved(first)
    case = RESIZED.get(second, FREE[second]) if first == second else FREE[second]
    history = joined(before, resumed(run_dir, case, tmp_path / "second"))
    assert len(history.losses) == case.steps
    draws: list[Draw] = [references(FREE["single"], size) for size in (32, 16)]
    assert [check for check in compare(draws, history, master="float32") if not check.passed] == []


@pytest.mark.parametrize("strategy", in_tiers(list(FREE), SAME))
def test_the_same_strategy_goes_on_as_if_nothing_had_been(strategy: str, tmp_path: Path, saved: Callable) -> None:
    run_dir, whole = saved(strategy)
    assert same(resumed(run_dir, FREE[strategy], tmp_path), whole)


ODD = [
    Case(strategy="ddp", world_size=4, tied=True),  # whose sums depend on the order of four addends
    own("DropsOut", strategy="ddp"),
    own("step_models.NoisyIdentity", strategy="pipeline"),
    own("HasStatistics", strategy="zero2"),
    own("HasStatistics", strategy="ddp", world_size=4),
    own("ResNet", strategy="fsdp", optimizer="sgd"),
    own("FrozenStem", strategy="zero2"),
    own("FrozenStem", strategy="zero3"),
    own("part_models.FrozenFirstHalf", strategy="fsdp"),
    Case(strategy="ddp", precision="bf16_master"),
    Case(strategy="zero3", precision="bf16_master"),
    Case(strategy="fsdp", precision="bf16_master", tied=True),
    RESIZED["3d"],  # parts of parts, of two data ranks
]


@pytest.mark.parametrize("case", in_tiers(ODD, ODD[1:2]), ids=str)
def test_what_is_random_frozen_counted_or_rounded_goes_on_as_if_nothing_had_been(case: Case, tmp_path: Path) -> None:
    whole = train_case([*case.overrides, f"checkpoint.every_steps={SAVED}"], tmp_path / "whole")
    after = train_case([*case.overrides, f"resume='{folder_of(tmp_path / 'whole', SAVED)}'"], tmp_path / "after")
    assert same(after, whole)


AFTER_VALIDATION = [
    own("DropsOut", strategy="ddp"),
    Case(strategy="zero3"),
    Case(strategy="fsdp", tied=True),
    FREE["pipeline"],
    GridCase(strategy="2d_pipeline", world_size=4, tied=True),
]


@pytest.mark.full
@pytest.mark.parametrize("case", AFTER_VALIDATION, ids=str)
def test_what_is_saved_for_its_validation_loss_goes_on_as_if_nothing_had_been(case: Case, tmp_path: Path) -> None:
    """Validation leaves units gathered that a training step would have let go of."""
    words = [*case.overrides, f"trainer.val_every_steps={SAVED}", "checkpoint.keep_best=2"]
    whole = train_case([*words, "checkpoint.at_end=false"], tmp_path / "whole")
    assert checkpoints(tmp_path / "whole") == [folder_of(tmp_path / "whole", step) for step in (SAVED, case.steps)]
    after = train_case([*words, f"resume='{folder_of(tmp_path / 'whole', SAVED)}'"], tmp_path / "after")
    assert same(after, whole)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "bf16_master", "bf16_pure", "fp64"])
def test_precision_may_change_on_the_way(precision: str, tmp_path: Path, saved: Callable) -> None:
    run_dir, whole = saved("ddp")
    case = replace(FREE["fsdp"], precision=precision)
    history = joined(whole, resumed(run_dir, case, tmp_path))
    assert history.samples == whole.samples
    worst = {"bf16_pure": 0.03, "fp64": 1e-5}.get(precision, 0.01)  # bfloat16 has 8 bits, of which few are left over
    assert np.allclose(history.losses, whole.losses, rtol=worst)
    assert history.losses[SAVED:] != whole.losses[SAVED:]
