"""Modules that optimize manually, with several optimizers: what plain Lightning computes, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from launch import preflight
from launch.schema import ConfigError
from tests.agreement.cases import STEPS, own
from tests.agreement.training import job_of, run_job, train_case, train_rank
from tests.harness import run_ranks
from tests.strategies import manual_models
from tests.tiers import in_tiers
from tracking.evidence import Evidence
from tracking.history import read_history
from tracking.record import RunRecord


def words_of(name: str, strategy: str, *words: str, world_size: int = 1, **case: Any) -> list[str]:
    case = {"clip": False, "optimizer": "sgd", **case}
    found = own(f"manual_models.{name}", strategy=strategy, world_size=world_size, **case)
    return [*found.overrides, *words]


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append([])
        self.counts.append(trainer.global_step)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.losses[-1].append(float(loss.detach()))


def train_plainly(overrides: Sequence[str], weights: dict[str, np.ndarray], folder: Path) -> None:
    """Nothing but a Lightning Trainer, on a run's data and first weights; Lightning counts calls of `step()`."""
    job = job_of([*overrides], folder)
    kind = getattr(manual_models, job.config.model["_target_"].rpartition(".")[2])
    module = kind(None, None, None)
    module.configure_model()
    module.to_empty(device="cpu")
    module.load_state_dict({fqn: torch.from_numpy(weight) for fqn, weight in weights.items()})
    module.configure_model = lambda: None
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2 * STEPS,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=job.data.build())
    assert losses.counts[:STEPS] == [2 * step for step in range(STEPS)]
    np.savez(folder / "plain.npz", **{fqn: weight.detach().numpy() for fqn, weight in module.named_parameters()})
    np.savetxt(folder / "losses.txt", losses.losses[:STEPS])


# Each loss of a step's backwards counts alike in what a run shows of it.
@pytest.mark.parametrize("name", in_tiers(["GAN", "UntoggledGAN"], ["GAN"]))
def test_gan_is_what_plain_lightning_makes_of_it(name: str, tmp_path: Path) -> None:
    overrides = words_of(name, "single")
    ours = train_case(overrides, tmp_path / "ours")
    run_ranks(
        1, tmp_path, train_plainly, [*overrides, f"trainer.max_steps={2 * STEPS}"], ours.first_weights[0], tmp_path
    )
    plain, losses = np.load(tmp_path / "plain.npz"), np.loadtxt(tmp_path / "losses.txt")
    assert ours.losses == pytest.approx(losses.mean(1), rel=1e-12)
    assert {fqn: (weight == plain[fqn]).all() for fqn, weight in ours.weights[0].items()} == dict.fromkeys(plain, True)


def same(one: Evidence, other: Evidence) -> None:
    assert one.samples == other.samples
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert [norms[0] for norms in one.gradient_norms] == pytest.approx(
        [norms[0] for norms in other.gradient_norms], rel=1e-4
    )
    for fqn, weight in one.weights[-1].items():
        assert weight == pytest.approx(other.weights[0][fqn], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", in_tiers(["GAN", "UntoggledGAN", "Accumulates"], ["GAN"]))
def test_manual_optimization_on_two_ranks_is_that_of_one(name: str, tmp_path: Path) -> None:
    two = words_of(name, "ddp", "strategy.find_unused_parameters=true", world_size=2)
    same(train_case(two, tmp_path / "two"), train_case(words_of(name, "single"), tmp_path / "one"))


def test_what_goes_with_a_run_counts_its_batches(tmp_path: Path) -> None:
    words = ["evidence=false", "debug=nan", "strategy.find_unused_parameters=true", "trainer.log_every_steps=2"]
    overrides = words_of("GAN", "ddp", *words, world_size=2)
    run_job(job := job_of(overrides, tmp_path), train_rank, job, None, None)
    record, history = RunRecord.read(tmp_path / "record.json"), read_history(tmp_path)
    assert (record.results.steps, record.results.train_loss) == (STEPS, None)
    assert list(history["optim/lr"].values) == pytest.approx([0.01, 0.005])
    assert list(history["optim/lr_2"].values) == pytest.approx([0.5, 0.25])
    assert all(norm <= 0.1 + 1e-6 for key in ("optim/grad_norm", "optim/grad_norm_2") for norm in history[key].values)
    assert list(history["val/loss"].steps) == [STEPS]
    assert f"step {STEPS}/{STEPS}" in (tmp_path / "ranks/0.log").read_text() or (tmp_path / "rank0.log").exists()


@pytest.mark.parametrize("strategy", in_tiers(["single", "ddp"], ["ddp"]))
def test_gradients_that_are_no_numbers_end_the_run_before_they_are_stepped_by(strategy: str, tmp_path: Path) -> None:
    words = ["strategy.find_unused_parameters=true"] if strategy == "ddp" else []
    overrides = words_of("NanGAN", strategy, *words, world_size=1 + len(words))
    with pytest.raises(AssertionError) as failure:
        train_case(overrides, tmp_path)
    said = "trainer.on_nan=stop: the gradients that SGD is to step by are nan or inf in optimizer step 2 (of 4)"
    assert str(failure.value).count(said) == 1 + len(words)


def test_ddp_names_the_key_for_what_a_backward_does_not_reach(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        train_case(words_of("GAN", "ddp", world_size=2), tmp_path)
    assert "does not reach parameter judge.0.weight; set strategy.find_unused_parameters=true" in str(failure.value)


REFUSED = {
    "clipping": (["trainer.clip_norm=1"], "trainer.clip_norm=1.0: GAN optimizes manually"),
    "accumulation": (["data.micro_batch_size=4"], "data.global_batch_size=16: GAN optimizes manually, and takes data."),
    "on_nan": (["trainer.on_nan=skip"], "trainer.on_nan=skip: GAN optimizes manually"),
    "masters": (["precision=bf16_master"], "precision=bf16_master: GAN optimizes manually"),
    "checkpoints": (["checkpoint.every_steps=2"], "checkpoint.every_steps, every_minutes, keep_best, at_end: GAN"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_nothing_would_do_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        preflight.check(job_of(words_of("GAN", "single", *words), tmp_path))
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "fsdp", "pipeline"])
def test_engines_that_step_by_themselves_refuse_it(strategy: str, tmp_path: Path) -> None:
    job = job_of(words_of("Accumulates", strategy, world_size=2), tmp_path)
    with pytest.raises(ValueError, match=rf"strategy={strategy}.* and Accumulates optimizes manually; set automatic"):
        preflight.check(job)
