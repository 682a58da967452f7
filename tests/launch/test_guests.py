"""Callbacks and loggers as Lightning's documentation shows them, trained with on forked ranks."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from launch.job import Job
from launch.worker import loggers, train
from strategies.checkpoint import Manifest, checkpoints, folder_of
from tests.agreement.training import counted, job_of, run_job
from tests.tiers import in_tiers
from tracking.record import RunRecord
from tracking.wandb_logger import finish_wandb

RANKS = {"single": 1, "hsdp": 4, "2d": 4, "2d_pipeline": 4, "3d": 8}
# Of each engine, and of each way to spread; zero2, fsdp and ddp are in the test after this one.
FAMILIES = ["single", "zero3_offload", "2d_pipeline", "pipeline"]
EVERYDAY = ("pipeline",)


def words_for(strategy: str, model: str = "vit") -> list[str]:
    own = [] if model == "vit" else [f"model._target_=tests.strategies.{model}"]
    nets = ["layers=4", "heads=2", "kv_heads=2"] if model == "vit" else []
    return [
        "model=vit_tiny",
        "data=digits",
        *(f"model.net.num_{word}" for word in nets if not word.startswith("kv")),
        *(["model.net.hidden_size=32", "model.net.mlp_size=64"] if model == "vit" else []),
        *own,
        "optimizer.lr=0.001",
        "data.global_batch_size=16",
        "data.micro_batch_size=4",
        "data.max_val_samples=16",
        "trainer.max_steps=10",
        "trainer.log_every_steps=1",
        "logger=none",
        "launcher.accelerator=cpu",
        f"strategy={strategy}",
        f"launcher.devices={RANKS.get(strategy, 2)}",
    ]


def train_rank(job: Job, callbacks: list[pl.Callback]) -> None:
    train(job, callbacks=callbacks, stats=counted(job) if job.mesh.cuts else None)


def run(folder: Path, *words: str, callbacks: tuple[pl.Callback, ...] = ()) -> RunRecord:
    job = job_of(list(words), folder)
    if job.mesh.cuts:
        counted(job)
    run_job(job, train_rank, job, list(callbacks))
    return RunRecord.read(folder / "record.json")


def columns(folder: Path) -> dict[str, list[str]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [row[key] for row in rows if row[key]] for key in rows[0]}


# The first validation is the best, whatever it says; after two more that are no better by so much, the run ends.
STOPS = [
    "callbacks=[early_stopping,lr_monitor,device_stats,timer]",
    "callbacks.early_stopping.min_delta=1000000",
    "callbacks.early_stopping.patience=2",
    "trainer.val_every_steps=2",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
]


@pytest.mark.parametrize("strategy", in_tiers(FAMILIES, EVERYDAY))
def test_early_stopping_ends_a_run_in_order_and_goes_on_counting(strategy: str, tmp_path: Path) -> None:
    record = run(tmp_path / "first", *words_for(strategy), *STOPS)
    assert record.results.steps == 6
    assert record.results.val_loss is not None
    assert checkpoints(tmp_path / "first") == [folder_of(tmp_path / "first", step) for step in (4, 6)]
    said = (tmp_path / "first/rank0.log").read_text()
    assert "Ended behind step 6 of 10: Monitored metric val/loss did not improve in the last 2 records." in said

    logged = columns(tmp_path / "first")
    rates = [key for key in logged if key.startswith("lr-")]
    assert rates
    assert all(logged[rate] for rate in rates)
    assert any(key.startswith("DeviceStatsMonitor") for key in logged)

    if strategy not in EVERYDAY:
        return
    # Had it forgotten what it counted before step 4, it would end behind step 8.
    after = run(tmp_path / "second", *words_for(strategy), *STOPS, f"resume='{folder_of(tmp_path / 'first', 4)}'")
    assert after.results.steps == 6


@pytest.mark.full
def test_what_a_callback_counted_under_one_strategy_another_goes_on_with(tmp_path: Path) -> None:
    run(tmp_path / "first", *words_for("zero2"), *STOPS, "trainer.max_steps=4")
    resume = f"resume='{folder_of(tmp_path / 'first', 4)}'"
    assert run(tmp_path / "second", *words_for("fsdp"), *STOPS, resume).results.steps == 6
    run(tmp_path / "third", *words_for("ddp"), "trainer.max_steps=5", resume)
    said = (tmp_path / "third/rank0.log").read_text()
    assert "resume: this run has no EarlyStopping{" in said
    assert "no Timer{" in said or "no Timer" in said
    assert said.count("is dropped.") == 1


class Counts(pl.Callback):
    """A user's own."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append((trainer.global_step, torch.tensor(trainer.global_rank)))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert all(isinstance(rank, Tensor) for _, rank in state_dict["seen"])
        self.seen = state_dict["seen"]


class Stops(Counts):
    """Ends the run behind its third step, at which nothing is validated."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_batch_end(trainer)
        trainer.should_stop = trainer.should_stop or (trainer.global_step, len(self.seen)) == (3, 6)


class Keeps(pl.Callback):
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        checkpoint["mine"] = 1


class KeepsObject(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": object()}


def own(name: str) -> list[str]:
    return ["callbacks=own", f"callbacks.own._target_=tests.launch.test_guests.{name}"]


def test_a_callback_of_ones_own_keeps_its_state_and_may_end_the_run(tmp_path: Path) -> None:
    record = run(tmp_path / "first", *words_for("ddp", "own_models.Blocks"), *own("Stops"))
    assert record.results.steps == 3
    assert record.results.val_loss is not None
    saved = Manifest.read(folder_of(tmp_path / "first", 3)).callbacks
    assert [len(state["dict"][0][1]) for state in saved.values()] == [6]  # two micro-batches a step
    assert "Ended behind step 3 of 10: trainer.should_stop was set." in (tmp_path / "first/rank0.log").read_text()
    words = [*own("Stops"), "trainer.max_steps=5", f"resume='{folder_of(tmp_path / 'first', 3)}'"]
    run(tmp_path / "second", *words_for("ddp", "own_models.Blocks"), *words)
    saved = Manifest.read(folder_of(tmp_path / "second", 5)).callbacks
    assert [len(state["dict"][0][1]) for state in saved.values()] == [10]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "told"), {"Keeps": "Keeps.on_save_checkpoint is not called", "KeepsObject": "has a object"}.items()
)
def test_a_callback_that_cannot_be_kept_is_told(name: str, told: str, tmp_path: Path) -> None:
    words = [*words_for("single", "own_models.Blocks"), *own(name), "trainer.max_steps=1"]
    run(tmp_path / "unasked", *words)
    assert f"No checkpoint is made: {name}" in (tmp_path / "unasked/rank0.log").read_text()
    assert told in (tmp_path / "unasked/rank0.log").read_text()
    with pytest.raises(AssertionError, match=f"checkpoint: .*{told}"):
        run(tmp_path / "asked", *words, "checkpoint.every_steps=1")


@pytest.mark.full
def test_what_a_model_brings_sees_a_step_before_it_is_saved(tmp_path: Path) -> None:
    run(tmp_path, *words_for("ddp", "trainer_models.BringsMonitor"), "trainer.max_steps=2")
    assert columns(tmp_path)["lr-AdamW"]


@pytest.mark.parametrize("strategy", in_tiers(["ddp", "zero3"], ["ddp"]))
def test_loggers_are_there_on_every_rank(strategy: str, tmp_path: Path) -> None:
    run(tmp_path, *words_for(strategy, "trainer_models.UsesLogger"), "trainer.max_steps=2")
    logged = columns(tmp_path)
    assert len(logged["own/loss"]) == 4  # of the first rank's two micro-batches a step
    assert logged["own/rank"] == ["0.0"] * 4


COUNTED = [("UsesNumbers", "single"), ("UsesTrainer", "ddp"), ("UsesTrainer", "pipeline"), ("UsesNumbers", "fsdp")]


@pytest.mark.parametrize(("model", "strategy"), in_tiers(COUNTED, COUNTED[:1]))
def test_what_counting_lacks_is_not_counted_and_changes_nothing(model: str, strategy: str, tmp_path: Path) -> None:
    words = [*words_for(strategy, f"trainer_models.{model}"), "trainer.max_steps=2"]
    record = run(tmp_path / model, *words)
    assert record.model_stats.flops_per_sample is None
    plain = run(tmp_path / "plain", *words_for(strategy, "own_models.Blocks"), "trainer.max_steps=2")
    assert plain.model_stats.flops_per_sample is not None or strategy == "pipeline"
    assert record.results.train_loss == plain.results.train_loss


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero2"])
def test_a_summary_is_of_the_whole_model(strategy: str, tmp_path: Path) -> None:
    words = ["callbacks=own", "callbacks.own._target_=lightning.pytorch.callbacks.ModelSummary", "trainer.max_steps=1"]
    record = run(tmp_path, *words_for(strategy, "own_models.Blocks"), *words)
    said = (tmp_path / "rank0.log").read_text()
    assert f"{record.model_stats.parameters / 1000:.1f} K" in said


@pytest.mark.full
def test_a_callback_of_functions_is_called(tmp_path: Path) -> None:
    words = ["callbacks=own", "callbacks.own._target_=tests.launch.test_guests.says_so", "trainer.max_steps=1"]
    run(tmp_path, *words_for("ddp", "own_models.Blocks"), *words)
    for rank in range(2):
        assert "fit is over" in (tmp_path / f"rank{rank}.log").read_text()


def says_so() -> pl.Callback:
    return LambdaCallback(on_fit_end=lambda trainer, module: print("fit is over"))


@pytest.mark.full
def test_wandb_is_there_on_every_rank(tmp_path: Path) -> None:
    job = job_of([*words_for("ddp", "own_models.Blocks"), "logger=wandb", "logger.mode=offline"], tmp_path)
    own, other = loggers(job, 0, "run"), loggers(job, 1, "run")
    finish_wandb(own, ok=True)
    assert [type(logger).__name__ for logger in other] == ["CSVLogger", "WandbLogger"]
    assert isinstance(own[1], WandbLogger)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1  # others make none


@pytest.mark.full
def test_counting_moves_no_random_stream(tmp_path: Path) -> None:
    """A run that is made to be compared does not count, and has the same losses."""
    words = [*words_for("single", "trainer_models.EagerAndNoisy"), "trainer.max_steps=3"]
    counts, compared = (run(tmp_path / value, *words, f"evidence={value}") for value in ("false", "true"))
    assert counts.model_stats.flops_per_sample is not None
    assert compared.model_stats.flops_per_sample is None
    assert counts.results.train_loss == compared.results.train_loss
    assert counts.results.val_loss == compared.results.val_loss
