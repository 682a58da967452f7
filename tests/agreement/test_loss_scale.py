"""A run in float16 goes on with the loss scale that it had, under whichever engine it goes on."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from strategies.checkpoint import LossScale, Manifest, folder_of
from strategies.engines.precision import LossScaler
from tests.agreement.cases import Case
from tests.agreement.training import train_case
from tests.tiers import in_tiers

SAVED = 2
BEFORE = LossScale(value=2.0**10, good_steps=LossScaler.GROWTH_INTERVAL - SAVED - 1)


class StartsSo(pl.Callback):
    """Starts a run with a scale that will grow a step after it was saved."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            engine: Any = trainer.strategy
            engine.scaling = BEFORE

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine: Any = trainer.strategy
        path = Path(trainer.default_root_dir) / f"scaling{trainer.global_rank}.json"
        path.write_text(engine.scaling.model_dump_json())


@pytest.mark.parametrize(
    ("first", "second"), in_tiers([("ddp", "zero2"), ("zero3", "single"), ("single", "ddp")], [("ddp", "zero2")])
)
def test_loss_scale_and_its_count_go_on(
    first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.job.check_precision", lambda *_: None)  # it asks for a GPU, for speed

    def case(strategy: str) -> Case:
        return Case(strategy=strategy, precision="fp16", world_size=1 if strategy == "single" else 2)

    half = ["optimizer.fused=false", f"checkpoint.every_steps={SAVED}"]
    train_case([*case(first).overrides, *half], tmp_path / "first", StartsSo)
    folder = folder_of(tmp_path / "first", SAVED)
    saved = Manifest.read(folder).loss_scale
    assert saved == LossScale(value=BEFORE.value, good_steps=LossScaler.GROWTH_INTERVAL - 1)
    train_case([*case(second).overrides, *half, f"resume='{folder}'"], tmp_path / "second", StartsSo)
    for rank in range(case(second).world_size):
        after = LossScale(**json.loads((tmp_path / f"second/scaling{rank}.json").read_text()))
        # One step more, and the scale has grown; another, and that is counted.
        assert after == LossScale(value=2 * BEFORE.value, good_steps=1)


def test_checkpoint_of_another_precision_has_no_loss_scale(tmp_path: Path) -> None:
    train_case([*Case(strategy="single", world_size=1).overrides, "checkpoint.at_end=true"], tmp_path)
    assert Manifest.read(folder_of(tmp_path, 4)).loss_scale is None
