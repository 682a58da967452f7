"""A step that NaN or infinity would reach ends the run, or is left out, alike under every strategy."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import yaml

from launch.compose import REPOSITORY
from tests.agreement.cases import STEPS, Case
from tests.agreement.grid_cases import GridCase
from tests.agreement.training import train_case
from tests.strategies.nan_models import STEP
from tests.tiers import in_tiers
from tracking.agreement import Draw, compare
from tracking.evidence import Evidence
from tracking.record import RunRecord

PRESETS = sorted(path.stem for path in (REPOSITORY / "conf/strategy").glob("[!_]*.yaml"))
PRESETS.remove("zero3_nvme")  # needs an extension that has to be built; its step is zero3's
WORLD_SIZES = {"single": 1, "hsdp": 4, "2d": 4, "2d_pipeline": 4, "3d": 8}


@dataclass(frozen=True, kw_only=True)
class NanCase(GridCase):
    fails_as: str = "NanOnce"
    on_nan: str = "skip"
    reference: Literal["plain", "true"] = "true"  # plain Lightning leaves no step out

    @property
    def shared(self) -> list[str]:
        model = f"model._target_=tests.strategies.nan_models.{self.fails_as}"
        return [*super().shared, model, f"trainer.on_nan={self.on_nan}"]


def case_of(number: int, preset: str) -> NanCase:
    """Switches differ from preset to preset."""
    return NanCase(
        strategy=preset,
        world_size=WORLD_SIZES.get(preset, 2),
        optimizer="adamw" if number % 2 else "sgd",
        clip=number % 4 < 2,
        accumulation=1 + number % 3 // 2,
    )


CASES = [case_of(number, preset) for number, preset in enumerate(PRESETS)]
# Weights whole on every rank, sharded in two ways by DeepSpeed, by FSDP, and cut into stages.
EVERYDAY = [case for case in CASES if case.strategy in ("single", "ddp", "zero2", "zero3", "fsdp", "pipeline")]
ODD = [
    NanCase(strategy="ddp", precision="bf16_master"),
    NanCase(strategy="zero2", precision="bf16_master", accumulation=2),
    NanCase(strategy="fsdp", precision="bf16_master", clip=False),
    NanCase(strategy="ddp", clip=False, fails_as="InfiniteOnce"),
    NanCase(strategy="zero1", fails_as="InfiniteOnce", accumulation=2),
    NanCase(strategy="zero3", fails_as="InfiniteOnce"),
    NanCase(strategy="zero3_offload", fails_as="InfiniteOnce", accumulation=2),
    NanCase(strategy="pipeline", fails_as="InfiniteOnce"),
    NanCase(strategy="ddp", fails_as="NanGradientOnce"),
    NanCase(strategy="zero2", fails_as="NanGradientOnce", clip=False),
    NanCase(strategy="fsdp", fails_as="NanGradientOnce", clip=False),
]


class Counts(pl.Callback):
    """Reports how many steps the optimizer has counted, and whether all that it steps is a number."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.report(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            self.report(trainer)

    def report(self, trainer: pl.Trainer) -> None:
        engine: Any = trainer.strategy
        counts = {float(state["step"]) for state in engine.stepping.state.values() if "step" in state}
        finite = all(bool(held.stepped.isfinite().all()) for held in engine.held())
        path = Path(trainer.default_root_dir) / f"counts{trainer.global_rank}.json"
        path.write_text(json.dumps([sorted(counts), finite]))


def counts(folder: Path, case: Case) -> list[Any]:
    return [json.loads((folder / f"counts{rank}.json").read_text()) for rank in range(case.world_size)]


def test_everyday_cases_are_of_every_engine() -> None:
    def engine(preset: str) -> str:
        tree = yaml.safe_load((REPOSITORY / f"conf/strategy/{preset}.yaml").read_text())
        return tree.get("_target_") or tree["defaults"][0]

    assert {engine(case.strategy) for case in EVERYDAY} == {engine(preset) for preset in PRESETS}


@pytest.mark.parametrize("case", in_tiers([*CASES, *ODD], EVERYDAY), ids=lambda case: f"{case}-{case.fails_as}")
def test_step_that_is_skipped_is_skipped_alike(case: NanCase, tmp_path: Path, references: Callable) -> None:
    candidate = train_case(case.overrides, tmp_path, Counts)
    for counted, finite in counts(tmp_path, case):
        assert finite
        assert set(counted) <= {STEPS - 1.0}
    # The reference's loss is NaN where all of its samples' is; what the weights became, and what was seen, is the same.
    same = [replace_losses(evidence) for evidence in references(case, case.global_batch)]
    checks = compare([Draw(*same)], replace_losses(candidate), **case.formats)
    assert [check for check in checks if not check.passed] == []
    results = RunRecord.read(tmp_path / "record.json").results
    assert (results.steps, results.skipped_steps) == (STEPS, 1)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [float(row["train/skipped_steps"]) for row in rows if row.get("train/skipped_steps")] == [1.0]
    assert results.train_loss is not None
    assert results.train_loss < 10  # a mean of the other steps
    log = (tmp_path / "rank0.log").read_text()
    assert log.count(f"step {STEP + 1}/{STEPS}  is skipped: ") == 1


def replace_losses(evidence: Evidence) -> Evidence:
    """The evidence without what is no number in the step that was skipped."""

    def without(values: list) -> list:
        return [value for step, value in enumerate(values) if step != STEP]

    return replace(evidence, losses=without(evidence.losses), gradient_norms=without(evidence.gradient_norms))


ENDING = [case for case in EVERYDAY if case.strategy in ("ddp", "zero3", "pipeline")]


@pytest.mark.parametrize("case", in_tiers(CASES, ENDING), ids=str)
def test_step_that_is_no_number_ends_the_run_on_every_rank(case: NanCase, tmp_path: Path) -> None:
    every_rank = rf"ranks \[{', '.join(map(str, range(case.world_size)))}\] of {case.world_size} failed"
    with pytest.raises(AssertionError, match=every_rank) as failure:
        train_case(replace(case, on_nan="stop").overrides, tmp_path, Counts)
    last = case.world_size - 1
    word = f"trainer.on_nan=stop: the loss of rank {last} is nan in optimizer step {STEP + 1} (of {STEPS}); lower"
    assert str(failure.value).count(f"ValueError: {word}") >= case.world_size
    for counted, finite in counts(tmp_path, case):
        assert finite
        assert set(counted) <= {float(STEP)}


SAID = [
    ("ddp", "InfiniteOnce", "the loss of rank 1 is inf"),
    ("zero3", "InfiniteOnce", "the loss of rank 1 is inf"),
    ("fsdp", "NanGradientOnce", "the gradients, though no loss, are nan or inf"),
    ("zero1", "NanGradientOnce", "the gradients, though no loss, are nan or inf"),
]


@pytest.mark.parametrize(("strategy", "fails_as", "word"), in_tiers(SAID, [SAID[2]]))
def test_what_is_no_number_is_said(strategy: str, fails_as: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        train_case(NanCase(strategy=strategy, fails_as=fails_as, on_nan="stop").overrides, tmp_path)
    assert f"trainer.on_nan=stop: {word} in optimizer step {STEP + 1} (of {STEPS})" in str(failure.value)
