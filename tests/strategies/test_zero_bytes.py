"""What ZeRO's ranks really hold and send with options of all kinds, counted, against what the spec says of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from strategies.spec import Transfer
from tests.strategies.census import Count, check_memory, check_traffic, counting_once
from tests.strategies.counting import DEEP_ODD

pytestmark = pytest.mark.full

GLOBAL_BATCH = 24


def words_of(strategy: str, ranks: int, accumulation: int, *overrides: str) -> list[str]:
    batch = f"data.micro_batch_size={GLOBAL_BATCH // ranks // accumulation}"
    where = [f"strategy={strategy}", f"launcher.devices={ranks}"]
    return [*DEEP_ODD, f"data.global_batch_size={GLOBAL_BATCH}", batch, *where, *overrides]


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Count:
    return counting_once(tmp_path_factory, words_of)


# Each stage as it comes is traced in test_traced.py: here are more ranks, further micro-batches, and every option.
RUNS: list[tuple[Any, ...]] = [
    ("zero1", 4, 3),
    ("zero2", 4, 3),
    ("zero3", 4, 1),
    ("zero3", 2, 3, "strategy.unit=module", "model.net.tie_embeddings=true"),
    ("zero1", 2, 1, "precision=bf16_master", "optimizer=sgd", "optimizer.lr=0.01"),
    ("zero2", 2, 3, "precision=bf16_master"),
    ("zero3", 2, 1, "precision=bf16_master", "strategy.bucket_mb=0.02"),
    ("zero3", 2, 1, "strategy.activation_checkpointing=full"),
    ("zero2", 2, 1, "strategy.reduce_to_owner=true", "strategy.communication_dtype=bfloat16"),
]
each_run = partial(pytest.mark.parametrize, "run", RUNS, ids=lambda run: "-".join(map(str, run)))


@each_run()
def test_held_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    check_memory(count(*run))


@each_run()
def test_sent_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    check_traffic(count(*run))


def test_stages_hold_less_and_less(count: Count) -> None:
    one, two, three = (count(*run) for run in RUNS[:3])
    assert one.held(0, "optimizer") == two.held(0, "optimizer")
    assert one.held(0, "parameters") == two.held(0, "parameters") > 3.5 * three.held(0, "parameters")


def test_stage_2_holds_fewer_gradients_than_stage_1(count: Count) -> None:
    one, two = (count(*run).held(0, "gradients") for run in RUNS[:2])
    assert two < 0.8 * one


def test_stage_3_sends_half_as_much_again_as_data_parallelism(count: Count) -> None:
    """3 P against 2 P on the wire, by what was counted."""
    run = count("zero3", 4, 1)
    kinds: tuple[Any, ...] = ("all_gather", "reduce_scatter")
    data_parallel = Transfer(collective="all_reduce", axis="data", ranks=4, payload=4 * run.stats.parameters)
    for rank in range(4):
        sent = run.sent(rank)
        wire_bytes = sum(
            Transfer(collective=kind, axis="data", ranks=4, payload=int(sent[kind, "data", 4])).wire_bytes
            for kind in kinds
        )
        assert wire_bytes == pytest.approx(1.5 * data_parallel.wire_bytes, rel=0.02)


GATHERED = ("all_gather", "data", 2)


def test_layers_are_gathered_a_third_time_for_forwards_that_run_again(count: Count) -> None:
    run = count("zero3", 2, 1, "strategy.unit=module", "strategy.activation_checkpointing=full")
    most = run.said(0)[GATHERED]
    for rank in range(2):  # all but the last layer of each block, which is still there, and what is in no block
        assert 0.8 * most < run.sent(rank)[GATHERED] <= most


def test_prefetching_sends_no_more_than_the_spec_says(count: Count) -> None:
    run = count("zero3", 2, 1, "strategy.prefetch_mb=0.05")
    assert all(run.sent(rank)[GATHERED] <= run.said(0)[GATHERED] for rank in range(2))
    assert run.held(0, "buffers") <= run.memory(0).buffers
