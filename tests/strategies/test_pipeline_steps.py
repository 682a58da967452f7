"""Steps under a pipeline: what they log, draw, change and pass on, against one process, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from strategies.engines.link import Passed
from strategies.engines.relay import NetCall
from tests.agreement.cases import own
from tests.agreement.training import train_case
from tests.tiers import in_tiers
from tracking.agreement import Draw, compare


def disagreements(name: str, folder: Path, *words: str, **case: object) -> list[str]:
    """What differs from one process by more than rounding."""
    candidate_case = own(f"step_models.{name}", strategy="pipeline", **case)
    candidate = train_case([*candidate_case.overrides, *words], folder / "candidate")
    reference = train_case(candidate_case.reference_overrides, folder / "reference")
    checks = compare([Draw(reference, reference)], candidate, master="float32")
    return [check.quantity for check in checks if check.difference > 1e-4]


class Shown(pl.Callback):
    """Writes down all metrics at the end."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"shown.{trainer.global_rank}.json"
        path.write_text(json.dumps({key: float(value) for key, value in trainer.callback_metrics.items()}))


def shown(name: str, folder: Path, strategy: str, world_size: int, *words: str) -> list[dict[str, float]]:
    case = own(f"step_models.{name}", strategy=strategy, world_size=world_size)
    train_case([*case.overrides, *words], folder / strategy, Shown)
    return [json.loads((folder / strategy / f"shown.{rank}.json").read_text()) for rank in range(world_size)]


def test_sums_extremes_and_metrics_of_hooks_are_those_of_one_process(tmp_path: Path) -> None:
    (expected,) = shown("LogsExtremes", tmp_path, "single", 1)
    wanted = {"train/sum", "train/max", "train/min", "train/accuracy", "val/micro", "val/macro"}
    assert wanted <= expected.keys()
    for found in shown("LogsExtremes", tmp_path, "pipeline", 2):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
def test_evaluation_draws_for_each_batch_anew_and_once_for_both_ends(tmp_path: Path) -> None:
    for found in shown("NoisyIdentity", tmp_path, "pipeline", 2, "data.max_val_samples=32"):
        assert found["val/drawn_apart"] == 0
        assert found["val/drawn_0"] != found["val/drawn_1"]


@pytest.mark.full
def test_shapes_between_stages_may_change_from_step_to_step(tmp_path: Path) -> None:
    assert disagreements("Trims", tmp_path) == []


# Of V-shaped schedules one rank has both ends; of looped ones each has stages whose neighbours lie elsewhere.
@pytest.mark.full
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_steps_may_change_their_batch(schedule: str, tmp_path: Path) -> None:
    assert disagreements("ChangesBatch", tmp_path, f"strategy.schedule={schedule}") == []


@pytest.mark.parametrize(
    "name", in_tiers(["ChangesInput", "PassesLoss", "PassesTable", "PassesComplex"], ["PassesLoss"])
)
def test_trains_as_on_one_process(name: str, tmp_path: Path) -> None:
    assert disagreements(name, tmp_path) == []


REFUSED = {
    "PassesColumns": "has a part of shape (32,) for a micro-batch",
    "PenalizesWeights": "PenalizesWeights.training_step reads all parameters, of which a rank has a part at most",
}


@pytest.mark.parametrize("name", in_tiers([*REFUSED], ["PassesColumns"]))
def test_what_cannot_be_right_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case = own(f"step_models.{name}", strategy="pipeline")
    with pytest.raises(AssertionError, match=r"ValueError: strategy(\.mesh\.pipe: |=pipeline: )") as failure:
        train_case(case.overrides, tmp_path)
    assert REFUSED[name] in " ".join(str(failure.value).split())


def test_what_no_header_can_tell_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"module net\.1 gives torch\.float8_e4m3fn, which cannot go"):
        Passed.of(torch.zeros(2, dtype=torch.float8_e4m3fn), 2, ["net.0", "net.1"])
    with pytest.raises(ValueError, match=r"module net\.1 gives 20 tensors of 40 dims together, more than can go"):
        Passed.of((torch.zeros(2, 2),) * 20, 2, ["net.0", "net.1"])


def test_keyword_that_the_first_unit_takes_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    call = NetCall(net, "Model")
    with pytest.raises(ValueError, match="Model calls its net with input by keyword"):
        call.arguments(lambda: net.forward(input=torch.zeros(1, 2)), nn.Linear(2, 2))
