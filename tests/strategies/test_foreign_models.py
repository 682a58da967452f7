"""What teams' own modules compute is what one process computes with the whole batch, or is refused by name."""

import ast
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from launch import preflight
from strategies.checkpoint import newest
from strategies.engines.construction import constructing
from strategies.engines.materialize import materialize
from strategies.engines.own_code import check_copies
from strategies.engines.precision import Half
from tests.agreement.cases import Case, own
from tests.agreement.training import disagreements, job_of, run_job, train_case, train_rank
from tests.strategies import foreign_models
from tests.tiers import in_tiers
from tracking.agreement import compare

CPU = torch.device("cpu")


def foreign(name: str, strategy: str, **case: Any) -> Case:
    world_size = {"single": 1, "2d_pipeline": 4}.get(strategy, 2)
    return own(f"foreign_models.{name}", strategy=strategy, **{"world_size": world_size, "accumulation": 2, **case})


MASKED = ["Masked", "MaskedByHand", "MaskedBySum", "SaysNumTargets", "SmoothedAndPenalized", "FewTargets"]
WAYS = ["single", "ddp", "zero2", "zero3", "fsdp", "pipeline"]
EVERYDAY_MASKED = [("Masked", "zero3"), ("Masked", "pipeline"), ("FewTargets", "ddp"), ("SaysNumTargets", "fsdp")]
EVERYDAY_MASKED += [("MaskedByHand", "single"), ("SmoothedAndPenalized", "zero2")]


# Each model under every second strategy, and each strategy with every second model.
MASKED_WAYS = [(name, way) for one, name in enumerate(MASKED) for other, way in enumerate(WAYS) if (one + other) % 2]


@pytest.mark.parametrize(
    ("name", "strategy"),
    in_tiers([*EVERYDAY_MASKED, *(pair for pair in MASKED_WAYS if pair not in EVERYDAY_MASKED)], EVERYDAY_MASKED),
)
def test_a_mean_over_some_targets_is_the_whole_batchs(
    name: str, strategy: str, tmp_path: Path, references: Callable
) -> None:
    assert disagreements(foreign(name, strategy), tmp_path, references) == []


@pytest.mark.parametrize("strategy", in_tiers(["ddp", "fsdp", "tensor", "pipeline"], ["ddp", "tensor"]))
def test_a_prompt_counts_for_nothing_however_a_batch_is_cut(strategy: str, tmp_path: Path) -> None:
    shared = ["recipe=study_masked", "data.sequence_length=64", "logger=none", "evidence=true", "trainer.max_steps=4"]
    shared += ["trainer.val_every_steps=null", "launcher.accelerator=cpu"]
    shared += ["model.net.num_layers=1", "model.net.hidden_size=32", "model.net.mlp_size=64", "data.max_val_samples=8"]
    whole = train_case([*shared, "strategy=single", "data.micro_batch_size=16"], tmp_path / "whole")
    words = [f"strategy={strategy}", "launcher.devices=2", "data.micro_batch_size=2"]
    words += ["strategy.micro_batches=2"] if strategy == "pipeline" else []
    cut = train_case([*shared, *words], tmp_path / "cut")
    assert cut.losses == pytest.approx(whole.losses, abs=1e-6)
    assert cut.val_losses[0] == pytest.approx(whole.val_losses[0], abs=1e-6)


FINDS_UNUSED = "strategy.find_unused_parameters=true"
BRANCHES = [
    ("BranchesOutside", "ddp", FINDS_UNUSED),
    ("BranchesOutside", "fsdp", ""),
    ("BranchesOutside", "hsdp", ""),
    ("BranchesOutside", "tensor", ""),
    ("BranchesInside", "ddp", FINDS_UNUSED),
    ("BranchesInside", "tensor", ""),
    ("BranchesInside", "pipeline", ""),
    ("HasSpare", "ddp", FINDS_UNUSED),
    *(("HasSpare", way, "") for way in ("zero1", "zero2", "zero3", "zero3_offload", "fsdp", "hsdp", "pipeline")),
]
EVERYDAY_BRANCHES = [*BRANCHES[:2], ("HasSpare", "zero2", ""), ("HasSpare", "zero3", "")]


@pytest.mark.parametrize(("name", "strategy", "word"), in_tiers(BRANCHES, EVERYDAY_BRANCHES))
def test_what_a_sample_does_not_use_is_trained_as_on_one_process(
    name: str, strategy: str, word: str, tmp_path: Path, references: Callable
) -> None:
    case = foreign(name, strategy, **({"world_size": 4} if strategy == "hsdp" else {}))
    assert disagreements(case, tmp_path, references, *filter(None, [word])) == []


SYNCED = [(name, way) for name in ("Normalized", "ResNet") for way in ("ddp", "zero1", "zero3", "fsdp")]


@pytest.mark.parametrize(("name", "strategy"), in_tiers(SYNCED, [("Normalized", "ddp"), ("Normalized", "fsdp")]))
def test_statistics_of_the_batch_are_those_of_all_ranks(
    name: str, strategy: str, tmp_path: Path, references: Callable
) -> None:
    case = foreign(name, strategy, accumulation=1)
    if name == "ResNet":
        case = own(name, strategy=strategy, optimizer="sgd", world_size=2)
    wrong = disagreements(case, tmp_path, references, "trainer.sync_batchnorm=true")
    assert wrong == []
    assert disagreements(case, tmp_path / "apart", references) != []  # else there was nothing to see


CANNOT_SPLIT = {
    "Fused": "strategy.mesh.tensor=2: 1 (FusedBlock) does not run with its modules split as plan.tensor says (1.fused "
    "colwise, 1.out rowwise): ValueError: not enough values to unpack (expected 3, got 2) (foreign_models.py:",
    "SplitsTransposed": "plan.tensor: 1 is called colwise, but is a Transposed and no nn.Linear, which is all that can",
    "SplitsAdapted": "give the style to 1.base inside of it",
    "SplitsParametrized": "plan.tensor: 1 is called colwise, but its weight is computed anew in every forward",
}


@pytest.mark.parametrize("name", in_tiers(list(CANNOT_SPLIT), ["Fused", "SplitsAdapted"]))
def test_a_tensor_plan_that_cannot_work_is_refused_before_ranks_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(CANNOT_SPLIT[name])):
        preflight.check(job_of(foreign(name, "tensor").overrides, tmp_path))


def test_what_is_tried_before_a_run_leaves_nothing_behind(tmp_path: Path) -> None:
    words = [*foreign("DropsInParts", "tensor").overrides, "checkpoint.at_end=true"]
    preflight.check(job_of(words, tmp_path / "job"))
    train_case(words, tmp_path / "run")  # forked from here: torch caches where a rank's part lies, by the mesh
    assert newest(tmp_path / "run")


def test_what_cannot_be_tried_on_one_sample_is_not_refused(tmp_path: Path, references: Callable) -> None:
    case = foreign("NeedsPairs", "tensor")
    preflight.check(job_of(case.overrides, tmp_path / "job"))
    assert disagreements(case, tmp_path, references) == []


NESTED = ["ddp", "zero1", "zero2", "fsdp"]


@pytest.mark.parametrize("strategy", in_tiers(NESTED, ["zero2"]))
def test_what_a_backward_inside_of_a_backward_reaches_is_trained(
    strategy: str, tmp_path: Path, references: Callable
) -> None:
    assert disagreements(foreign("Reentrant", strategy), tmp_path, references) == []


@pytest.mark.full
def test_what_was_never_stepped_is_not_stepped_by_deepspeed_as_if_it_had_been(tmp_path: Path) -> None:
    halved = [*foreign("LateHead", "zero2").overrides, "trainer.max_steps=2", "checkpoint.at_end=true"]
    train_case(halved, tmp_path / "first")
    resume = f"resume='{newest(tmp_path / 'first')}'"
    whole = train_case(foreign("LateHead", "single").overrides, tmp_path / "whole")
    after = train_case([*foreign("LateHead", "fsdp").overrides, resume], tmp_path / "fsdp")
    assert after.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    with pytest.raises(AssertionError, match=r"no loss before the checkpoint has reached parameter late\.bias"):
        train_case([*foreign("LateHead", "zero2").overrides, resume], tmp_path / "zero2")


TOWERS = [(way, word) for way in ("zero3", "fsdp") for word in ("", "strategy.activation_checkpointing=full")]


@pytest.mark.parametrize(("strategy", "word"), in_tiers(TOWERS, [("zero3", "")]))
def test_blocks_may_stand_side_by_side(strategy: str, word: str, tmp_path: Path, references: Callable) -> None:
    assert disagreements(foreign("Towers", strategy), tmp_path, references, *filter(None, [word])) == []


PARTED = [
    ("ddp", "BranchesOutside", "does not reach parameter spare.weight; set strategy.find_unused_parameters=true"),
    ("zero1", "BranchesOutside", "the losses of 1 of 2 ranks reach parameter few.weight"),
    ("zero2", "BranchesInside", "reaches parameter net.3.few.bias, as it did not in the first micro-batch"),
    ("zero3", "BranchesOutside", "rank 0 calls others while rank 1 calls few"),
    ("zero3", "BranchesInside", "calls net.3.few where the first micro-batch calls net.3.others"),
    ("fsdp", "BranchesInside", "reaches parameter net.3.few.bias, as it did not in the first micro-batch"),
    ("fsdp", "ReentrantBranches", "does not reach parameter net.2."),
    ("zero2", "Freezes", "requires_grad of parameter net.0.bias is not what it was in the first micro-batch"),
    ("fsdp", "Freezes", "requires_grad of parameter net.0.bias is not what it was in the first micro-batch"),
    ("ddp", "Freezes", "does not reach parameter net.0.weight"),
    ("2d_pipeline", "BranchesInside", "reaches parameter net.3.few.bias, as it did not in the first micro-batch"),
]


def test_a_batch_norm_that_some_ranks_call_is_refused(tmp_path: Path) -> None:
    words = [FINDS_UNUSED, "trainer.sync_batchnorm=true"]
    with pytest.raises(AssertionError, match="calls norm"):
        train_case([*foreign("NormsABranch", "ddp").overrides, *words], tmp_path)


@pytest.mark.parametrize(("strategy", "name", "said"), in_tiers(PARTED, [PARTED[0], PARTED[4], PARTED[5]]))
def test_samples_that_part_ranks_are_refused_by_name(strategy: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError"):
        train_case(foreign(name, strategy).overrides, tmp_path)
    logs = " ".join(" ".join(path.read_text().split()) for path in tmp_path.glob("rank*.log"))
    assert said in logs


SCALAR_WAYS = ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp", "hsdp", "2d_pipeline"]


@pytest.mark.parametrize("strategy", in_tiers(SCALAR_WAYS, ["zero2", "zero3", "fsdp"]))
def test_a_parameter_may_have_no_dims(strategy: str, tmp_path: Path, references: Callable) -> None:
    case = foreign("HasScalars", strategy, **({"world_size": 4} if strategy == "hsdp" else {}))
    assert disagreements(case, tmp_path, references) == []


@pytest.mark.parametrize(
    ("first", "second"), in_tiers([("zero3", "fsdp"), ("fsdp", "zero2"), ("zero2", "zero3")], [("zero3", "fsdp")])
)
def test_a_parameter_without_dims_is_resumed_under_another_strategy(first: str, second: str, tmp_path: Path) -> None:
    whole = train_case(foreign("HasScalars", first).overrides, tmp_path / "whole")
    halved = [*foreign("HasScalars", first).overrides, "trainer.max_steps=2", "checkpoint.at_end=true"]
    train_case(halved, tmp_path / "first")
    resumed = [*foreign("HasScalars", second).overrides, f"resume='{newest(tmp_path / 'first')}'"]
    after = train_case(resumed, tmp_path / "second")
    assert after.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert after.val_losses[0] == pytest.approx(whole.val_losses[0], rel=1e-5)


@pytest.mark.parametrize("strategy", in_tiers(["zero3", "fsdp", "pipeline"], ["pipeline"]))
def test_one_hook_may_call_another(strategy: str, tmp_path: Path, references: Callable) -> None:
    assert disagreements(foreign("ValidatesByTrainingStep", strategy), tmp_path, references) == []


class AnglesStay(pl.Callback):
    """Looks at a rank's buffers when all has been trained."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        buffers = dict(pl_module.named_buffers())
        assert {fqn.rpartition(".")[2] for fqn in buffers} == {"table", "narrowed"}
        for fqn, buffer in buffers.items():
            keeps = fqn.endswith("table")
            assert buffer.dtype == (torch.float32 if keeps else torch.bfloat16)
            assert torch.equal(buffer, foreign_models.angles()) is keeps


@pytest.mark.parametrize(
    ("strategy", "precision"),
    in_tiers(
        list(itertools.product(["single", "ddp", "zero2", "zero3", "fsdp", "pipeline"], ["bf16_pure", "bf16_master"])),
        [("ddp", "bf16_master"), ("zero3", "bf16_pure"), ("pipeline", "bf16_pure")],
    ),
)
def test_a_buffer_keeps_its_format_if_the_plan_says_so(strategy: str, precision: str, tmp_path: Path) -> None:
    train_case(foreign("KeepsAngles", strategy, precision=precision).overrides, tmp_path, AnglesStay)


def test_a_buffer_that_is_not_there_cannot_keep_its_format() -> None:
    module = foreign_models.KeepsAngles(net=None, optimizer=torch.optim.SGD, scheduler=None)
    module.configure_model()
    module.plan = replace(module.plan, keep_dtype=("*.tables",))
    with pytest.raises(ValueError, match=r"keep_dtype: '\*\.tables' matches no buffer"):
        Half("bf16-true").convert_module(module)


class CountsAlike(pl.Callback):
    """The fault of every mean of means: each micro-batch counts as much as the others."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        guard: Any = trainer.strategy.guard  # type: ignore[attr-defined]
        guard.terms.terms_of = lambda *_: None


@pytest.mark.parametrize("strategy", in_tiers(["ddp", "zero2", "fsdp"], ["ddp"]))
def test_a_mean_of_means_is_noticed(strategy: str, tmp_path: Path, references: Callable) -> None:
    case = foreign("Masked", strategy)
    candidate = train_case(case.overrides, tmp_path, CountsAlike)
    checks = compare([references(case, case.global_batch)], candidate, master="float32")
    assert {check.quantity for check in checks if not check.passed} >= {"loss", "gradient norm", "weights"}


DRAWING = [("Noisy", "ddp"), ("Noisy", "zero3"), ("Noisy", "fsdp"), ("Drops", "ddp"), ("Drops", "tensor")]


@pytest.mark.parametrize(("name", "strategy"), in_tiers(DRAWING[:-1], [("Noisy", "ddp")]))
def test_a_micro_batch_draws_the_same_on_whichever_rank_it_is(
    name: str, strategy: str, tmp_path: Path, references: Callable
) -> None:
    case = foreign(name, strategy)
    assert disagreements(case, tmp_path, references, micro_batch_size=case.micro_batch_size) == []


class DrawsAlike(pl.Callback):
    """The fault of a run whose ranks are seeded alike."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine: Any = trainer.strategy
        engine.place = lambda: (trainer.global_step, 0)


def test_ranks_that_draw_alike_are_noticed(tmp_path: Path, references: Callable) -> None:
    case = foreign("Noisy", "ddp")
    candidate = train_case(case.overrides, tmp_path, DrawsAlike)
    checks = compare([references(case, case.micro_batch_size)], candidate, master="float32")
    assert {check.quantity for check in checks if not check.passed} >= {"loss", "weights"}


BUILDERS = ["AppliesInit", "BuildsEagerly", "InitializesLate"]


@pytest.mark.parametrize(
    ("name", "strategy"),
    in_tiers(
        list(itertools.product(BUILDERS, ["ddp", "zero3", "fsdp", "pipeline"])),
        [("AppliesInit", "zero3"), ("BuildsEagerly", "fsdp"), ("InitializesLate", "pipeline")],
    ),
)
def test_a_net_starts_with_what_its_own_code_gave_it(
    name: str, strategy: str, tmp_path: Path, references: Callable
) -> None:
    case = foreign(name, strategy)
    assert disagreements(case, tmp_path, references) == []
    exact = references(case, case.global_batch).exact.first_weights[0]
    assert 0.01 < exact["net.0.weight"].std() < 0.03
    assert exact["net.3.bias"] == pytest.approx(0.1)


@pytest.mark.parametrize("precision", in_tiers(["fp64", "bf16_pure"], ["fp64"]))
def test_a_net_is_drawn_in_its_own_format(precision: str, tmp_path: Path, references: Callable) -> None:
    checks = disagreements(foreign("BuildsEagerly", "ddp", precision=precision), tmp_path, references)
    assert "initial weights" not in {check.quantity for check in checks}


@pytest.mark.parametrize("strategy", in_tiers(["ddp", "zero2"], ["zero2"]))
def test_a_teacher_follows_once_per_step(strategy: str, tmp_path: Path, references: Callable) -> None:
    assert disagreements(foreign("Taught", strategy), tmp_path, references) == []


def made(name: str) -> Any:
    module = getattr(foreign_models, name)(net=None, optimizer=torch.optim.SGD, scheduler=None)
    with constructing(module):
        module.configure_model()
    return module


def test_a_copy_starts_as_a_copy_and_is_known_for_one() -> None:
    module = made("Taught")
    with pytest.raises(ValueError, match=r"Taught.on_train_batch_end moves teacher, a frozen copy of net"):
        check_copies(module, "zero3")
    materialize(module, CPU, seed=1)
    pairs = list(zip(module.net.parameters(), module.teacher.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert float(module.net[0].weight.detach().std()) > 0
    with pytest.raises(ValueError, match="a frozen copy of net"):  # also of a net that is built eagerly
        check_copies(module, "fsdp")


REFUSED = [
    ("zero3", "Penalized", "Penalized.training_step reads parameter net.0.weight"),
    ("fsdp", "Penalized", "Penalized.training_step reads parameter net.0.weight"),
    ("pipeline", "Penalized", "Penalized.training_step reads all parameters"),
    ("zero1", "ReadsGradients", "ReadsGradients.on_before_optimizer_step reads the gradient of net.0.weight"),
    ("fsdp", "ReadsGradients", "ReadsGradients.on_before_optimizer_step reads the gradient of net.0.weight"),
    ("pipeline", "ReadsGradients", "ReadsGradients.on_before_optimizer_step reads all parameters"),
]


@pytest.mark.parametrize(("strategy", "name", "said"), in_tiers(REFUSED, [REFUSED[0], REFUSED[3], REFUSED[5]]))
def test_a_part_is_not_read_for_the_whole(strategy: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError") as failure:
        train_case(foreign(name, strategy).overrides, tmp_path)
    assert said in " ".join(str(failure.value).split())


def norms(strategy: str, folder: Path) -> dict[str, float]:
    train_case(foreign("AsksForNorms", strategy).overrides, folder)
    (line,) = [line for line in (folder / "rank0.log").read_text().splitlines() if line.startswith("norms ")]
    found: dict[str, float] = ast.literal_eval(line.removeprefix("norms "))
    return found


@pytest.mark.parametrize("strategy", in_tiers(["zero2", "zero3", "fsdp", "pipeline"], ["zero3", "pipeline"]))
def test_norms_are_the_whole_models(strategy: str, tmp_path: Path) -> None:
    assert norms(strategy, tmp_path / strategy) == pytest.approx(norms("single", tmp_path / "single"), rel=1e-5)


@pytest.mark.parametrize("strategy", in_tiers(["single", "zero2"], ["single"]))
def test_schedules_and_hooks_know_where_an_epoch_ends(strategy: str, tmp_path: Path) -> None:
    words = ["trainer.max_steps=205", "data.global_batch_size=16", "data.max_val_samples=19"]
    train_case([*foreign("PerEpoch", strategy).overrides, *words], tmp_path)
    lines = (tmp_path / "rank0.log").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and " epoch " in line]
    data: Any = job_of([*foreign("PerEpoch", strategy).overrides, *words], tmp_path / "job").data
    size = len(data.train_samples())
    first, second = (-(-epochs * size // 16) for epochs in (1, 2))  # the step that takes an epoch's last sample
    assert steps[first - 1 : first + 1] == [
        f"step {first - 1} epoch 0 rate 0.1000",
        f"step {first} epoch 1 rate 0.0500",
    ]
    assert steps[second] == f"step {second} epoch 2 rate 0.0250"
    ends = [line for line in lines if line.startswith("epoch ")]
    assert ends == [f"epoch 0 ends with step {first}", f"epoch 1 ends with step {second}", "epoch 2 ends with step 205"]


def test_tensor_ranks_drop_other_elements_of_what_each_has_a_part_of(tmp_path: Path) -> None:
    words = [word for word in foreign("DropsInParts", "tensor").overrides if not word.startswith("evidence")]
    job = job_of([*words, "evidence=false", "trainer.trace_steps=0"], tmp_path)
    run_job(job, train_rank, job, None, None)
    logs = [(tmp_path / f"rank{rank}.log").read_text().splitlines() for rank in range(2)]
    dropped = {
        name: [[line for line in log if line.startswith(f"dropped {name}")] for log in logs]
        for name in ("split", "whole")
    }
    assert len(dropped["split"][0]) > 4
    assert dropped["whole"][0] == dropped["whole"][1]
    assert not set(dropped["split"][0]) & set(dropped["split"][1])


@pytest.mark.full
def test_a_run_that_goes_on_where_an_epoch_ends_has_its_rate(tmp_path: Path) -> None:
    words = [*foreign("PerEpoch", "single").overrides, "data.max_val_samples=19", "trainer.max_steps=96"]
    data: Any = job_of(words, tmp_path / "job").data
    ends = -(-len(data.train_samples()) // 16)
    train_case([*words, f"checkpoint.every_steps={ends}"], tmp_path / "first")
    (saved,) = (tmp_path / "first/checkpoints").glob(f"step-*{ends}")
    train_case([*words, f"resume='{saved}'"], tmp_path / "second")
    lines = [(tmp_path / name / "rank0.log").read_text().splitlines() for name in ("first", "second")]
    rates = [[line for line in log if line.startswith(f"step {ends} epoch")] for log in lines]
    assert rates == [[f"step {ends} epoch 1 rate 0.0500"]] * 2
