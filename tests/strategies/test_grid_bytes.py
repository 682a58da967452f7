"""What a grid's ranks really hold and send with options of all kinds, counted, against what the spec says of it."""

from __future__ import annotations

from typing import Any

import pytest

from strategies import grid_costs
from strategies.grid import Grid
from strategies.grid_layout import Layout
from strategies.spec import BYTES
from tests.strategies.census import Count, Counted, check_memory, check_traffic, counting_once
from tests.strategies.counting import EVEN, ODD, TWO_STEPS

pytestmark = pytest.mark.full

GLOBAL_BATCH = 16
VIT = ["model=vit_tiny", "data=digits", "model.net.num_heads=2", "model.net.hidden_size=32", "model.net.mlp_size=64"]
GPT2 = ["model.net.norm=layer", "model.net.mlp=gelu", "model.net.bias=true", "model.net.positions=learned"]
GPT2 += ["+model.net.max_sequence_length=16"]
TIED = "model.net.tie_embeddings=true"


def words_of(strategy: str, mesh: str, accumulation: int, *overrides: str) -> list[str]:
    pipe, data, tensor = map(int, mesh.split("x"))
    return [
        *([] if "model=vit_tiny" in overrides else EVEN if tensor > 1 else ODD),
        *TWO_STEPS,
        f"data.global_batch_size={GLOBAL_BATCH}",
        f"data.micro_batch_size={GLOBAL_BATCH // data // accumulation}",
        f"strategy={strategy}",
        f"strategy.mesh={{pipe:{pipe},data:{data},tensor:{tensor}}}",
        *overrides,
    ]


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Count:
    return counting_once(tmp_path_factory, words_of)


# The mesh is pipe x data x tensor; then accumulation. Each preset as it comes is traced in test_traced.py.
RUNS: list[tuple[Any, ...]] = [
    ("fsdp", "1x4x1", 2, TIED, "precision=bf16_master"),
    ("fsdp", "1x2x1", 2, "strategy.reshard_after_forward=false", "optimizer=sgd", "optimizer.lr=0.01"),
    ("fsdp", "1x4x1", 2, "strategy.shard_ranks=1", "precision=bf16_master"),
    ("hsdp", "1x4x1", 2, "strategy.activation_checkpointing=full"),
    ("tensor", "1x1x2", 2, *GPT2, "precision=bf16", "strategy.activation_checkpointing=every_2"),
    ("tensor", "1x1x4", 1, TIED, "strategy.sequence_parallel=false", "strategy.loss_parallel=false"),
    ("tensor", "1x1x2", 1, *VIT, "precision=bf16_pure"),
    ("pipeline", "2x1x1", 2, TIED),
    ("pipeline", "2x1x1", 1, *VIT, "strategy.schedule=interleaved_1f1b", "precision=bf16"),
    ("pipeline", "4x1x1", 1, TIED, "strategy.schedule=zbv", "model.net.num_layers=7"),
    ("2d_pipeline", "2x2x1", 2, TIED, "strategy.reshard_after_forward=true"),
    ("3d", "2x2x2", 1, TIED, "strategy.schedule=zbv", "strategy.micro_batches=2"),
]
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{run[1]}")


def grid_of(run: Counted) -> Grid:
    assert isinstance(run.job.strategy, Grid)
    return run.job.strategy


@each_run
def test_held_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    counted = count(*run)
    width = BYTES[counted.workload.precision.parameter]

    def held(pipe_rank: int, category: str) -> int:
        most = counted.held(pipe_rank, category)
        # Gradients that come from a shared parameter's other places are added up into one more copy, which no
        # collective is given and the tracer does not see: engines/ties.py.
        ties = Layout(grid_of(counted), counted.stats).ties(pipe_rank)
        added_up = {len(tie.elsewhere) * tie.elements * width: tie.elements * width for tie in ties}
        return most + added_up.get(most, 0) if category == "buffers" else most

    check_memory(counted, held)


@each_run
def test_sent_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    check_traffic(count(*run))


@each_run
def test_a_strategys_figures_are_those_of_its_busiest_rank(run: tuple[Any, ...], count: Count) -> None:
    counted = count(*run)
    grid, stats, workload = grid_of(counted), counted.stats, counted.workload
    layout = Layout(grid, stats)
    totals = [grid_costs.rank_memory(layout, workload, pipe_rank).total for pipe_rank in range(grid.pipe)]
    assert grid.memory(stats, workload).total == max(totals)
    payloads = [sum(counted.sent(rank).values()) for rank in range(counted.job.world_size)]
    assert sum(sent.payload for sent in grid.traffic(stats, workload)) > 0.98 * max(payloads)
