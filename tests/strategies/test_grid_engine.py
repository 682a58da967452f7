"""The grid's engine on models as users write them: what it trains, what it refuses, what it never holds."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from launch import preflight
from launch.job import Job, resolve, run_of
from launch.schema import validate
from launch.worker import build_model, on_meta, stats_of
from strategies.checkpoint import newest
from strategies.engines.grid import GridEngine
from strategies.engines.shards import local
from strategies.grid import Grid
from tests.agreement.cases import own
from tests.agreement.training import disagreements, job_of, run_job, train_case, train_rank
from tests.composing import compose_fast
from tests.harness import run_ranks
from tests.tiers import in_tiers

BLOCKS = [
    (name, strategy)
    for strategy in ("fsdp", "pipeline")
    for name in ("Blocks", "SharedByBlocks", "FrozenStem", "BlocksFirst")
]


@pytest.mark.parametrize(
    ("name", "strategy"), in_tiers(BLOCKS, [("FrozenStem", "fsdp"), ("SharedByBlocks", "pipeline")])
)
def test_agrees_on_whatever_blocks_there_are(name: str, strategy: str, tmp_path: Path, references: Callable) -> None:
    assert disagreements(own(name, strategy=strategy, accumulation=2), tmp_path, references) == []


@pytest.mark.parametrize(
    ("strategy", "world_size", "schedule"),
    in_tiers([("pipeline", 2, "zbv"), ("pipeline", 4, "1f1b"), ("3d", 8, "1f1b")], [("pipeline", 2, "zbv")]),
)
def test_plain_chain_trains_as_on_one_process(
    strategy: str, world_size: int, schedule: str, tmp_path: Path, references: Callable
) -> None:
    case = own("MLP", strategy=strategy, world_size=world_size)
    assert disagreements(case, tmp_path, references, f"strategy.schedule={schedule}") == []


def test_pipeline_normalizes_batches_as_one_process_that_takes_its_micro_batches(
    tmp_path: Path, references: Callable
) -> None:
    case = own("ResNet", strategy="pipeline", optimizer="sgd")
    assert disagreements(case, tmp_path, references, micro_batch_size=4) == []


@pytest.mark.full
def test_3d_normalizes_batches_as_one_process_that_takes_its_micro_batches(
    tmp_path: Path, references: Callable
) -> None:
    case = own("ResNet", strategy="3d", optimizer="sgd", world_size=8)
    wrong = disagreements(case, tmp_path, references, "strategy.micro_batches=2", micro_batch_size=4)
    # Running statistics are those of the first data rank's samples, as under DDP; validation alone uses them.
    assert {check.quantity for check in wrong} <= {"validation loss"}


@pytest.mark.full
def test_ranks_validate_with_the_same_statistics(tmp_path: Path) -> None:
    ours, theirs = (
        train_case(own("ResNet", strategy=strategy, optimizer="sgd").overrides, tmp_path / strategy)
        for strategy in ("fsdp", "ddp")
    )
    assert ours.val_losses == pytest.approx(theirs.val_losses, rel=1e-6)


@pytest.mark.full
def test_tuple_passes_between_stages(tmp_path: Path, references: Callable) -> None:
    assert disagreements(own("PassesTuple", strategy="pipeline", world_size=4), tmp_path, references) == []


@pytest.mark.parametrize(
    ("strategy", "name", "words", "said"),
    [
        ("fsdp", "StepsTwiceBackward", ["trainer.clip_norm=null"], "StepsTwiceBackward optimizes manually"),
        (
            "tensor",
            "MLP",
            ["strategy.mesh.tensor=3", "launcher.devices=3"],
            "does not divide the 32 rows of 1.up.weight",
        ),
    ],
    ids=lambda part: part if str(part) else "",
)
def test_what_shows_without_ranks_is_refused_before_they_start(
    strategy: str, name: str, words: list[str], said: str, tmp_path: Path
) -> None:
    job = job_of([*own(name, strategy=strategy).overrides, *words], tmp_path)
    with pytest.raises(ValueError, match=said):
        preflight.check(job)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CallsTwice", "a step calls the net 2 times"),
        ("LeavesOut", "3 is not called with just what 1 gives"),
        ("DoesMore", "third is not called with just what second gives"),
        ("RunsABlockAgain", "where the plan has 5, the net's forward calls 1"),
    ],
)
def test_plan_that_is_not_its_nets_forward_is_refused(name: str, said: str, tmp_path: Path) -> None:
    job = job_of(own(name, strategy="pipeline").overrides, tmp_path)
    module: Any = on_meta(build_model(job.config))
    assert isinstance(job.strategy, Grid)
    engine = GridEngine(job.strategy, run_of(job.config, job.data, "cpu", stats_of(module, job)))
    chain = module.plan.expand(fqn for fqn, _ in module.net.named_modules())
    with pytest.raises(ValueError, match=f"not its net's forward: {said}"):
        engine.check_chain(module.net, chain)


ON_RANKS = [
    ("pipeline", "CallsTwice", "not its net's forward: a step calls the net 2 times"),
    ("pipeline", "PassesDict", "module 2 gives dict, but only a tensor or a tuple of tensors"),
    ("pipeline", "NoLoss", "returns no loss, on rank 1; return one for every batch"),
    ("pipeline", "HasScale", "parameter scale lies outside of the chain"),
    ("zero1", "StepsMatrices", "but Muon looks at a whole one"),
]


@pytest.mark.parametrize(("strategy", "name", "said"), in_tiers(ON_RANKS, [ON_RANKS[0], ON_RANKS[-1]]))
def test_what_cannot_be_right_is_refused_by_name(strategy: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError") as failure:
        train_case(own(name, strategy=strategy).overrides, tmp_path)
    assert said in " ".join(str(failure.value).split())


WHOLE = [("fsdp", 2), ("hsdp", 4), ("tensor", 2), ("pipeline", 2), ("2d", 4), ("2d_pipeline", 4), ("3d", 8), ("ddp", 2)]
WHOLE_STEPPERS = [*(("StepsMatrices", *way) for way in WHOLE), *(("StepsByRows", *way) for way in WHOLE[:5:2])]


@pytest.mark.parametrize(
    ("name", "strategy", "world_size"),
    in_tiers(WHOLE_STEPPERS, [("StepsMatrices", "fsdp", 2), ("StepsMatrices", "tensor", 2), ("StepsByRows", "2d", 4)]),
)
def test_an_optimizer_may_look_at_whole_parameters(
    name: str, strategy: str, world_size: int, tmp_path: Path, references: Callable
) -> None:
    assert disagreements(own(name, strategy=strategy, world_size=world_size), tmp_path, references) == []


@pytest.mark.parametrize(
    ("first", "second"), in_tiers([("fsdp", "ddp"), ("ddp", "2d"), ("2d", "fsdp")], [("fsdp", "ddp")])
)
def test_an_optimizer_that_looks_at_whole_parameters_goes_on_elsewhere(first: str, second: str, tmp_path: Path) -> None:
    def case(strategy: str) -> list[str]:
        return own("StepsMatrices", strategy=strategy, world_size=4 if strategy == "2d" else 2).overrides

    whole = train_case(case(first), tmp_path / "whole")
    train_case([*case(first), "trainer.max_steps=2", "checkpoint.at_end=true"], tmp_path / "first")
    after = train_case([*case(second), f"resume='{newest(tmp_path / 'first')}'"], tmp_path / "second")
    assert after.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert after.val_losses[0] == pytest.approx(whole.val_losses[0], rel=1e-5)


@pytest.mark.full
def test_what_an_optimizer_keeps_may_depend_on_a_parameters_shape(tmp_path: Path) -> None:
    case = own("StepsByRows", strategy="2d", world_size=4).overrides
    whole = train_case(case, tmp_path / "whole")
    train_case([*case, "trainer.max_steps=2", "checkpoint.at_end=true"], tmp_path / "first")
    after = train_case([*case, f"resume='{newest(tmp_path / 'first')}'"], tmp_path / "second")
    assert after.losses == whole.losses[2:]


def test_a_first_step_may_be_traced(tmp_path: Path) -> None:
    words = [word for word in own("MLP", strategy="fsdp").overrides if not word.startswith(("evidence", "trainer.max"))]
    job = job_of([*words, "evidence=false", "trainer.max_steps=1", "trainer.trace_steps=1"], tmp_path)
    run_job(job, train_rank, job, None, None)
    assert (tmp_path / "trace.json").exists()


class WhatIsLogged(pl.Callback):
    """Writes down the metrics of every step and of the end."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        own = ("train/size", "train/odd", "train/accuracy", "val/accuracy", "val/loss")
        return {key: float(value) for key, value in trainer.callback_metrics.items() if key in own}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(self.metrics(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"logged.{trainer.global_rank}.json"
        path.write_text(json.dumps([*self.steps, self.metrics(trainer)]))


def logged(strategy: str, world_size: int, folder: Path) -> list[list[dict[str, float]]]:
    """What each rank logs."""
    train_case(own("Logs", strategy=strategy, world_size=world_size).overrides, folder, WhatIsLogged)
    return [json.loads((folder / f"logged.{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def logged_by_one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    (found,) = logged("single", 1, tmp_path_factory.mktemp("single"))
    assert found[-1].keys() == {"train/size", "train/odd", "train/accuracy", "val/accuracy", "val/loss"}
    return found


LOGGING = [("pipeline", 2), ("2d_pipeline", 4), ("tensor", 2), ("fsdp", 2)]


@pytest.mark.parametrize(("strategy", "world_size"), in_tiers(LOGGING, [("pipeline", 2)]))
def test_every_rank_logs_what_one_process_logs(
    strategy: str, world_size: int, tmp_path: Path, logged_by_one: list[dict[str, float]]
) -> None:
    for found in logged(strategy, world_size, tmp_path):
        # Within a data-parallel step the metrics are those of a rank's samples; over the epoch they are everybody's.
        assert found[-1] == pytest.approx(logged_by_one[-1], rel=1e-4)
        if world_size == 2 and strategy != "fsdp":
            assert found == [pytest.approx(step, rel=1e-4) for step in logged_by_one]


class DrawnApart(WhatIsLogged):
    def metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        return {"train/drawn_apart": float(trainer.callback_metrics["train/drawn_apart"])}


def test_first_and_last_stage_draw_the_same_at_random(tmp_path: Path) -> None:
    train_case(own("Mixes", strategy="pipeline").overrides, tmp_path, DrawnApart)
    for rank in range(2):
        steps = json.loads((tmp_path / f"logged.{rank}.json").read_text())
        assert [step["train/drawn_apart"] for step in steps] == [0.0] * 5


class SeenBatches(pl.Callback):
    """Writes down on which device batches come."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: list[torch.Tensor], batch_idx: int
    ) -> None:
        path = Path(trainer.default_root_dir) / f"seen.{trainer.global_rank}.json"
        path.write_text(json.dumps([str(tensor.device) for tensor in batch]))


@pytest.mark.full
def test_only_ranks_of_first_and_last_stage_read_samples(tmp_path: Path) -> None:
    train_case(own("MLP", strategy="pipeline", world_size=4).overrides, tmp_path, SeenBatches)
    seen = [set(json.loads((tmp_path / f"seen.{rank}.json").read_text())) for rank in range(4)]
    assert seen == [{"cpu"}, {"meta"}, {"meta"}, {"cpu"}]


GIB = 2**30


class LeftOnMeta:
    """Stands in for the Materializer: a net that is cut and split, but given no values."""

    def __init__(self, *_: Any) -> None: ...

    def make(self, prefix: str = "") -> None: ...


def spread_rank(rank: int, job: Job, folder: Path) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from strategies.engines import grid

    grid.Materializer = LeftOnMeta  # type: ignore[assignment,misc]
    assert isinstance(job.strategy, Grid)
    dist.init_process_group("fake", rank=rank, world_size=job.world_size, store=FakeStore())
    model = build_model(job.config)
    model.configure_model()
    engine = GridEngine(job.strategy, run_of(job.config, job.data, "cpu"))
    engine.make_mesh(torch.device("cpu"))
    engine.spread(model, torch.device("cpu"))
    held = sum(local(parameter).numel() for parameter in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"{rank}.json").write_text(json.dumps({"held": held, "peak": peak}))


@pytest.mark.parametrize("strategy", in_tiers(["3d", "fsdp"], ["fsdp"]))
def test_llama_8b_is_cut_for_8_ranks_without_the_memory_of_its_weights(strategy: str, tmp_path: Path) -> None:
    words = [
        "model=llama_8b",
        "data=synthetic",
        f"strategy={strategy}",
        "launcher.devices=8",
        "data.micro_batch_size=4",
    ]
    batch = [
        "data.global_batch_size=32",
        "data.micro_batch_size=4",
        "launcher.accelerator=cpu",
        f"run_dir='{tmp_path}'",
    ]
    job = Job.of(resolve(validate(compose_fast([*words, *batch]))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ranks = [0, 3, 7]
    for rank in ranks:
        run_ranks(1, tmp_path / str(rank), spread_rank, rank, job, tmp_path)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in ranks]
    assert all(report["peak"] - before < 2 * GIB for report in reports)
    # Eight parts of 8.03 billion parameters, but for what a pipeline's stages differ by.
    assert all(0.7e9 < report["held"] < 1.4e9 for report in reports)
