"""ParallelPlan: globs, order, and what it refuses."""

import subprocess
import sys

import pytest

from models.plan import ParallelPlan, matches

NAMES = ["", "embed", "blocks", *[f"blocks.{i}" for i in range(12)], "blocks.0.mlp", "norm", "head"]


def test_globs_expand_in_natural_order() -> None:
    plan = ParallelPlan(stem=("embed",), blocks=("blocks.*",), head=("norm", "head"))
    chain = plan.expand(reversed(NAMES))
    assert chain.blocks == tuple(f"blocks.{i}" for i in range(12))
    assert chain.modules == ("embed", *chain.blocks, "norm", "head")


def test_a_star_never_crosses_a_dot() -> None:
    assert matches("blocks.*.mlp", "blocks.3.mlp")
    assert not matches("blocks.*", "blocks.3.mlp")


def test_an_entry_that_matches_nothing_is_named_with_its_part() -> None:
    with pytest.raises(ValueError, match=r"^plan\.blocks: 'layers\.\*' matches no module of the net; [^\n]+$"):
        ParallelPlan(blocks=("layers.*",)).expand(NAMES)


def test_an_unknown_tensor_style_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^plan\.tensor\['head'\]='columns' is no style; choose from colwise, [^\n]+$"
    ):
        ParallelPlan(tensor={"head": "columns"})


def test_a_missing_part_is_refused_by_model_and_part() -> None:
    plan = ParallelPlan(blocks=("blocks.*",))
    plan.require(["blocks"], "mine.Model")
    with pytest.raises(ValueError, match=r"^model=mine\.Model has no plan\.tensor, [^\n]+$"):
        plan.require(["blocks", "tensor"], "mine.Model")


def test_the_plan_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import models.plan, sys; assert 'torch' not in sys.modules"], check=True)
