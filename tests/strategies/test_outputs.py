"""What steps return: all of it reaches hooks under every strategy, and what is no loss gets one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from strategies.engines.outputs import check_output, joined_rest
from strategies.engines.steps import split
from tests.agreement.cases import own
from tests.agreement.training import train_case
from tests.strategies import output_models
from tests.tiers import in_tiers


class Shown(pl.Callback):
    """Writes down all metrics at the end, and what callbacks are given of a step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.keys = sorted(outputs)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"shown.{trainer.global_rank}.json"
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        path.write_text(json.dumps([self.keys, metrics]))


def shown(folder: Path, strategy: str, world_size: int) -> list[list[Any]]:
    case = own("output_models.ReturnsMore", strategy=strategy, world_size=world_size)
    train_case(case.overrides, folder / strategy, Shown)
    return [json.loads((folder / strategy / f"shown.{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("strategy", in_tiers(["ddp", "zero2", "zero3", "fsdp", "tensor", "pipeline"], ["pipeline"]))
def test_hooks_are_given_what_steps_return_as_in_one_process(strategy: str, tmp_path: Path) -> None:
    ((keys, metrics),) = shown(tmp_path, "single", 1)
    assert keys == ["logits", "loss", "mean", "nested"]
    assert metrics["train/again"] == pytest.approx(metrics["train/loss_again"], rel=1e-5)
    for found in shown(tmp_path, strategy, 2):
        assert found == [keys, pytest.approx(metrics, rel=1e-4)]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # as Lightning says it, once
def test_step_without_a_loss_is_left_out_as_by_plain_lightning(tmp_path: Path) -> None:
    case = own("output_models.ReturnsNone", strategy="single", world_size=1)
    plain = train_case(case.reference_overrides, tmp_path / "plain")
    ours = train_case(case.overrides, tmp_path / "ours")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
    assert ours.losses[1] == 0.0
    for fqn, weight in ours.weights[0].items():
        assert weight == pytest.approx(plain.weights[0][fqn], rel=1e-5, abs=1e-7)


REFUSED = {
    "ReturnsNoLoss": "returns a dict of objective, on rank 0; give its loss as 'loss'.",
    "ReturnsNumber": "returns float, on rank 0; return a tensor, or a dict with one as its loss.",
    "ReturnsList": "returns list, on rank 0; return a tensor, or a dict with one as its loss.",
    "ReturnsRows": "returns a loss of shape (3,), on rank 0; return one number, such as its mean.",
    "ReturnsInteger": "returns a loss of int64, on rank 0; return a loss of real numbers.",
    "ReturnsComplex": "returns a loss of complex64, on rank 0; return a loss of real numbers.",
    "ReturnsDetached": "returns a loss that depends on no parameter (it has no gradient), on rank 0; take it with "
    "gradients, and from what the optimizer trains.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_loss_gets_one_line(name: str) -> None:
    module = getattr(output_models, name)(None, torch.optim.SGD, None)
    module.net = nn.Sequential(nn.Linear(64, 10))
    batch = [torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.int64)]
    with pytest.raises(ValueError) as refusal:
        check_output(module, module.training_step(batch, 0))
    line = type(module).training_step.__code__.co_firstlineno
    assert str(refusal.value) == f"model: {name}.training_step (output_models.py:{line}) {REFUSED[name]}"


@pytest.mark.full
@pytest.mark.parametrize(("name", "strategy"), [("ReturnsNoLoss", "pipeline"), ("ReturnsNumber", "zero2")])
def test_it_is_told_by_the_rank_that_has_it(name: str, strategy: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        train_case(own(f"output_models.{name}", strategy=strategy).overrides, tmp_path)
    assert REFUSED[name].partition(",")[0] + ", on rank" in str(failure.value)


class Both(NamedTuple):
    images: Tensor
    names: list[str]


def test_parts_of_a_batch_keep_together() -> None:
    batch: dict[str, Any] = {
        "both": Both(torch.arange(5), list("abcde")),
        "scale": [torch.tensor(2.0)],
        "word": "same",
        "sizes": (1, 2),
    }
    batch["seen"] = [{"boxes": torch.zeros(number, 4)} for number in range(5)]
    parts, sizes = split(batch, 2)
    assert sizes == [3, 2]
    assert [part["both"].images.tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    assert [part["both"].names for part in parts] == [list("abc"), list("de")]
    assert [[len(one["boxes"]) for one in part["seen"]] for part in parts] == [[0, 1, 2], [3, 4]]
    assert [(part["scale"][0].item(), part["word"], part["sizes"]) for part in parts] == [(2.0, "same", (1, 2))] * 2


def test_what_cannot_be_joined_is_refused_by_its_key() -> None:
    def row(value: Tensor) -> dict[str, Any]:
        return {"count": value}

    assert joined_rest([row(torch.ones(2)), row(torch.zeros(1))], [2, 1], "Model")["count"].tolist() == [1, 1, 0]
    named = [{"names": ["a", "b"]}, {"names": ["c"]}]
    assert joined_rest(named, [2, 1], "Model") == {"names": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=r"Model\.training_step returns a 'count' that cannot be joined"):
        joined_rest([row(torch.tensor(2)), row(torch.tensor(1))], [2, 1], "Model")
