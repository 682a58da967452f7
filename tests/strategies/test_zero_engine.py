"""The DeepSpeed engine: what it writes down, what it never holds whole, what it does when numbers go wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from launch.job import run_of
from strategies.engines.deepspeed import check_module, leaf_blocks
from strategies.engines.extensions import deepspeed_extension, is_current
from strategies.engines.precision import LossScaler
from tests.agreement.cases import Case, own
from tests.agreement.training import disagreements, job_of, train_case
from tests.strategies import own_models
from tests.tiers import in_tiers
from tracking.record import RunRecord


def reports(folder: Path, name: str) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]


def report(trainer: pl.Trainer, name: str, content: object) -> None:
    path = Path(trainer.default_root_dir) / f"{name}.{os.environ['RANK']}.json"
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of stage 2 whose gradients are reduced in another format."""
    folder = tmp_path_factory.mktemp("accumulated")
    words = ["strategy.communication_dtype=bfloat16", "trainer.max_steps=1"]
    train_case([*Case(strategy="zero2", accumulation=4).overrides, *words], folder)
    return folder


def test_record_names_another_format_of_reduction(accumulated: Path) -> None:
    assert RunRecord.read(accumulated / "record.json").precision.reduce == "bfloat16"


def test_run_folder_holds_the_configuration_that_was_used(accumulated: Path) -> None:
    config = json.loads((accumulated / "deepspeed.json").read_text())
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_clipping"] == pytest.approx(0.3)
    assert config["zero_optimization"]["stage"] == 2


class WholeWhileMade(pl.Callback):
    """Records the most elements of parameters that a rank holds at once while the net gets its first weights."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from deepspeed.runtime.zero.partition_parameters import Init

        shard, most = Init._convert_to_zero_parameters, [0]

        def watched(init: object, parameters: Iterable[Tensor]) -> None:
            held = sum(parameter.numel() for parameter in pl_module.parameters() if not parameter.is_meta)
            most[0] = max(most[0], held)
            report(trainer, "made", most[0])
            shard(init, parameters)

        Init._convert_to_zero_parameters = watched

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        report(trainer, "sizes", [parameter.ds_numel for parameter in pl_module.parameters()])  # type: ignore[attr-defined]


class SavedForBackward(pl.Callback):
    """Records the shapes of the bfloat16 tensors that forward keeps for backward."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16:
            self.shapes.add(tuple(tensor.shape))
        return tensor

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        self.hooks.__exit__()
        report(trainer, "saved", sorted(self.shapes))


class Looks(WholeWhileMade, SavedForBackward):
    pass


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run with bfloat16 products, by its strategy."""

    @cache
    def train(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp(strategy)
        look = Looks if strategy == "zero3" else SavedForBackward
        train_case([*Case(strategy=strategy, precision="bf16").overrides, "trainer.max_steps=1"], folder, look)
        return folder

    return train


def test_stage_3_never_holds_more_than_a_module_while_the_net_is_made(looked_at: Callable[[str], Path]) -> None:
    folder = looked_at("zero3")
    assert len(reports(folder, "made")) == 2
    for most, sizes in zip(reports(folder, "made"), reports(folder, "sizes"), strict=True):
        assert most == max(sizes) < sum(sizes) / 3


@pytest.mark.parametrize(("strategy", "keeps"), [("ddp", True), ("zero3", False)])
def test_stage_3_keeps_no_cast_weights_for_backward(
    strategy: str, keeps: bool, looked_at: Callable[[str], Path]
) -> None:
    weight = [64, 32]  # mlp_size, hidden_size
    found = reports(looked_at(strategy), "saved")
    assert [weight in shapes or weight[::-1] in shapes for shapes in found] == [keeps] * 2


class NotANumber(pl.Callback):
    """The second step's gradient of one weight is not a number, on the last rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            next(pl_module.parameters()).register_hook(
                lambda gradient: gradient * float("nan") if trainer.global_step == 1 else gradient
            )


@pytest.mark.parametrize(
    ("strategy", "precision"),
    in_tiers(
        [("zero1", "fp32"), ("zero3", "fp32"), ("zero1", "bf16_master"), ("zero3", "bf16_master")],
        [("zero3", "bf16_master")],
    ),
)
def test_gradient_that_is_no_number_ends_the_run_on_every_rank(strategy: str, precision: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 failed") as failure:
        train_case(Case(strategy=strategy, precision=precision).overrides, tmp_path, NotANumber)
    assert "the gradients, though no loss, are nan or inf in optimizer step 2 (of 4)" in str(failure.value)


class TooLargeScale(pl.Callback):
    """Starts with a loss scale that float16 cannot bear, and records what became of it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        strategy.scaler.value = 2.0**40
        strategy.deepspeed_engine.optimizer.override_loss_scale(strategy.scaler.value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        report(trainer, "scale", [strategy.scaler.value, strategy.deepspeed_engine.skipped_steps])


@pytest.mark.parametrize("strategy", in_tiers(["zero2", "zero3"], ["zero2"]))
def test_float16_lowers_its_scale_and_leaves_the_step_out(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.job.check_precision", lambda *_: None)  # it asks for a GPU, for speed
    words = [*Case(strategy=strategy, precision="fp16").overrides, "optimizer.fused=false"]
    train_case(words, tmp_path, TooLargeScale)
    for scale, skipped in reports(tmp_path, "scale"):
        assert skipped > 0
        assert scale == 2.0 ** (40 - skipped)


@pytest.mark.parametrize("strategy", in_tiers(["zero1", "zero3"], []))
def test_float16_agrees_with_float32_to_its_own_rounding(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.job.check_precision", lambda *_: None)
    case = Case(strategy=strategy, precision="fp16", optimizer="sgd", accumulation=2)
    half = train_case([*case.overrides, "optimizer.fused=false"], tmp_path / "half")
    full = train_case(Case(optimizer="sgd").reference_overrides, tmp_path / "full")
    assert half.losses == pytest.approx(full.losses, rel=2**-11)
    for ours, theirs in zip(half.gradient_norms, full.gradient_norms, strict=True):
        assert ours == pytest.approx(theirs * 2, rel=2**-9)  # on both ranks, unscaled


def test_loss_scale_moves_as_torchs_does() -> None:
    ours, theirs = LossScaler(), torch.amp.GradScaler("cpu", growth_interval=LossScaler.GROWTH_INTERVAL)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(4500):
        overflow = step in (3, 4, 2500)
        theirs.scale(torch.zeros(()))
        weight.grad = torch.full((1,), float("inf") if overflow else 0.0)
        theirs.step(optimizer)
        theirs.update()
        assert ours.after(overflow=overflow) == theirs.get_scale(), step


def made(kind: type[own_models.Blocks]) -> own_models.Blocks:
    """A model with its net on the meta device."""
    model = kind(None, torch.optim.SGD, None)
    model.configure_model()
    return model


SAFE = {
    own_models.Blocks: ["net.1", "net.2"],
    own_models.SharedByBlocks: [],
    own_models.FrozenStem: ["net.2"],
    own_models.BlocksFirst: ["net.1"],
}


@pytest.mark.parametrize("kind", SAFE)
def test_only_blocks_that_can_be_reduced_at_once_are_gathered_at_once(kind: type[own_models.Blocks]) -> None:
    assert leaf_blocks(made(kind)) == SAFE[kind]


BLOCKS = [(kind, checkpointing) for checkpointing in ("none", "full") for kind in SAFE]


@pytest.mark.parametrize(("kind", "checkpointing"), in_tiers(BLOCKS, [(own_models.SharedByBlocks, "full")]))
def test_stage_3_agrees_on_whatever_blocks_there_are(
    kind: type[own_models.Blocks], checkpointing: str, tmp_path: Path, references: Callable
) -> None:
    case = own(kind.__name__, strategy="zero3", accumulation=2, checkpointing=checkpointing)
    assert disagreements(case, tmp_path, references) == []
    leaves = json.loads((tmp_path / "deepspeed.json").read_text())["zero_optimization"]["leaf_module"]
    assert leaves["names"] == SAFE[kind]


class ForwardsOnStack(pl.Callback):
    """Records how many modules DeepSpeed takes to be in their forward when none is."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        report(trainer, "stack", len(FWD_MODULE_STACK))


@pytest.mark.parametrize("unit", in_tiers(["block", "module"], []))
def test_forwards_that_run_again_leave_nothing_behind(unit: str, tmp_path: Path) -> None:
    case = Case(strategy="zero3", checkpointing="full", unit=unit)
    train_case(case.overrides, tmp_path, ForwardsOnStack)
    assert reports(tmp_path, "stack") == [1, 1]  # the root, which DeepSpeed puts there once


RANDOM = [(name, strategy) for name in ("HasStatistics", "DropsOut") for strategy in ("zero1", "zero3")]


@pytest.mark.parametrize(("name", "strategy"), in_tiers(RANDOM, [("HasStatistics", "zero3")]))
def test_what_is_random_or_of_one_rank_is_as_under_ddp(name: str, strategy: str, tmp_path: Path) -> None:
    # SGD, since the bias before a normalisation has no gradient but rounding, which AdamW makes a step of.
    ours = train_case(own(name, strategy=strategy, optimizer="sgd").overrides, tmp_path / "zero")
    theirs = train_case(own(name, optimizer="sgd").overrides, tmp_path / "ddp")
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.val_losses == pytest.approx(theirs.val_losses, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (own_models.ClipsByItself, "would ignore ClipsByItself.configure_gradient_clipping"),
    ],
)
def test_what_deepspeed_would_get_wrong_is_refused(kind: type[own_models.Blocks], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_module(made(kind), "zero2", stage=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ClipsByItself", "would ignore ClipsByItself.configure_gradient_clipping"),
        ("ClosesTwice", "a second backward before the optimizer's step"),
        ("StepsTwiceBackward", "and StepsTwiceBackward optimizes manually"),
    ],
)
def test_what_ranks_refuse_is_their_last_word(name: str, words: str, tmp_path: Path) -> None:
    case = own(name, strategy="zero2", clip=False)
    with pytest.raises(AssertionError) as failure:
        train_case(case.overrides, tmp_path)
    assert words in str(failure.value).splitlines()[-1]  # nothing that is raised while tearing down hides it


@pytest.mark.parametrize("kind", [own_models.FrozenStem, own_models.SharedByBlocks])
def test_block_that_stage_3_gathers_in_pieces_is_not_compiled(kind: type[own_models.Blocks], tmp_path: Path) -> None:
    job = job_of(own(kind.__name__, strategy="zero3", compile=True).overrides, tmp_path)
    with pytest.raises(ValueError, match="choose strategy=zero2") as refusal:
        job.strategy.check_module(made(kind), run_of(job.config, job.data, "cpu"))
    said = f"compile=true: strategy=zero3 cannot gather {kind.__name__}'s block net.1 at once"
    assert str(refusal.value).startswith(said)


def test_nvme_agrees_with_one_process_and_cleans_up(tmp_path: Path, references: Callable) -> None:
    if not is_current(deepspeed_extension("async_io")):
        pytest.skip("async_io is not built here: python -m strategies.engines.extensions async_io")
    case = Case(strategy="zero3_nvme", accumulation=4, tied=True)
    assert disagreements(case, tmp_path / "nvme-run", references) == []
    assert not (tmp_path / "nvme-run/nvme").exists()
