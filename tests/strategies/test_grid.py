"""The grid's spec: which settings it takes, and how it refuses the others, before any process exists."""

import pytest

from launch.job import Job, resolve
from launch.schema import ConfigError, validate
from models.plan import Chain, ParallelPlan
from strategies.grid import Grid
from tests.composing import compose_fast

PIPELINE = ["strategy=pipeline", "data.micro_batch_size=8"]


def job_of(*words: str) -> Job:
    return Job.of(resolve(validate(compose_fast(["model=gpt_tiny", "launcher.accelerator=cpu", *words]))))


def grid_of(*words: str) -> Grid:
    strategy = job_of(*words).strategy
    assert isinstance(strategy, Grid)
    return strategy


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (["strategy=fsdp"], 2),
        (["strategy=hsdp"], 4),
        (["strategy=2d"], 4),
        (["strategy=2d_pipeline"], 4),
        (["strategy=3d"], 8),
        (["strategy=3d", "strategy.mesh.pipe=1"], 4),
        (["strategy=fsdp", "strategy.shard_ranks=4"], 8),
    ],
)
def test_rehearsal_has_two_ranks_on_every_axis_of_a_preset(words: list[str], world_size: int) -> None:
    assert job_of(*words, "data.micro_batch_size=4").world_size == world_size


def test_shards_and_replicas_make_up_the_data_axis() -> None:
    hybrid = grid_of("strategy=hsdp", "launcher.devices=8", "data.micro_batch_size=4")
    assert (hybrid.shards, hybrid.replicas) == (2, 4)
    whole = grid_of("strategy=fsdp", "launcher.devices=8", "data.micro_batch_size=4")
    assert (whole.shards, whole.replicas) == (8, 1)


REFUSED = [
    (["strategy=hsdp", "launcher.devices=3"], "strategy.shard_ranks=2 does not divide the data axis of 3 ranks"),
    (["strategy=fsdp", "strategy.shard_ranks=1", "strategy.cpu_offload=true"], "moves what is sharded, and nothing is"),
    (["strategy=fsdp", "precision=fp16", "optimizer.fused=false"], "does not scale losses; choose precision=bf16"),
    ([*PIPELINE, "strategy.stages_per_rank=2"], "stages_per_rank=2: schedule=1f1b takes 1"),
    ([*PIPELINE, "strategy.schedule=zbv", "strategy.stages_per_rank=3"], "schedule=zbv takes 2"),
    ([*PIPELINE, "strategy.schedule=looped_bfs", "strategy.stages_per_rank=1"], "set it to 2 or more"),
    ([*PIPELINE, "strategy.micro_batches=9"], "micro_batches=9 exceeds data.micro_batch_size=8"),
    ([*PIPELINE, "strategy.schedule=dualpipev", "strategy.micro_batches=3"], "at least one for each of the 4 stages"),
    ([*PIPELINE, "strategy.schedule=interleaved_1f1b", "strategy.micro_batches=5"], "in 2 rounds"),
    ([*PIPELINE, "strategy.schedule=zbv", "compile=true"], "takes a backward apart"),
    (
        ["strategy=2d_pipeline", "strategy.schedule=zbv", "strategy.reshard_after_forward=true"],
        "takes weight gradients after the weights would be gone",
    ),
    (["strategy=pipeline", "strategy.schedule=2f2b"], "strategy.schedule"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda part: part if isinstance(part, str) else "")
def test_setting_that_cannot_run_is_refused_in_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.job.check_precision", lambda *_: None)  # it refuses fp16 on a CPU before the strategy
    with pytest.raises(ConfigError) as refusal:
        job_of(*words)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


PLAN = ParallelPlan(blocks=("blocks.*",), splits={"model.net.num_heads": 16, "model.net.vocab_size": 50257})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["strategy=tensor", "launcher.devices=3"],
            "tensor=3 does not divide model.net.num_heads=16; choose 1, 2",
        ),
        (["strategy=tensor", "launcher.devices=2"], "tensor=2 does not divide model.net.vocab_size=50257"),
        (["strategy=pipeline", "launcher.devices=8"], "need 8 modules to cut between, but the model's plan has 4"),
    ],
)
def test_plan_that_cannot_be_spread_so_is_refused_in_the_words_of_the_config(words: list[str], said: str) -> None:
    chain = Chain(stem=(), blocks=("blocks.0", "blocks.1", "blocks.2", "blocks.3"), head=())
    with pytest.raises(ValueError, match=said):
        grid_of(*words, "data.micro_batch_size=4").check_plan(PLAN, chain)


def test_bubble_is_that_of_the_schedule_in_use() -> None:
    assert grid_of("strategy=fsdp").bubble() == 0
    assert grid_of(*PIPELINE, "launcher.devices=4").bubble() == pytest.approx(3 / 7)
    assert grid_of("strategy=model_parallel", "launcher.devices=4").bubble() == pytest.approx(3 / 4)
    interleaved = grid_of(*PIPELINE, "launcher.devices=4", "strategy.schedule=interleaved_1f1b")
    assert interleaved.bubble() == pytest.approx(3 / 11)
    assert grid_of(*PIPELINE, "launcher.devices=4").bubble((1, 1, 1, 2)) > 3 / 7
