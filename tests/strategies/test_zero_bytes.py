"""What ZeRO's ranks really hold and send, counted, against what the spec says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
from torch import Tensor

from launch.compose import compose
from launch.job import Job, resolve
from launch.schema import validate
from launch.worker import train
from models.stats import ModelStats
from strategies.spec import Transfer, Workload
from tests.agreement.training import run_job
from tests.strategies.counting import DEEP_ODD, STEADY, stats_of
from tracking.traffic import TrafficCounter

pytestmark = pytest.mark.full


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes by address of what these tensors hold, each storage once."""
    held = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel()]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


class Census(pl.Callback):
    """Counts the bytes of one rank in the run's last step, by what DeepSpeed's engine holds on to."""

    zero: Any  # DeepSpeed's optimizer

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / f"census{os.environ['RANK']}.json"
        self.counter = TrafficCounter()
        self.gradients_peak = self.buffers_peak = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine: Any = trainer.strategy.model
        self.zero = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        self.parameters: list[Any] = list(pl_module.parameters())
        for module in pl_module.modules():  # after DeepSpeed's hooks, which gather
            module.register_forward_pre_hook(lambda *_: self.sample())
        for parameter in self.parameters:
            # Before DeepSpeed's own hooks take the gradient over, and after.
            parameter.register_hook(lambda gradient: self.sample(gradient.nbytes))
            parameter.register_post_accumulate_grad_hook(lambda _: self.sample())
        self.step, self.zero._optimizer_step = self.zero._optimizer_step, self.sample_and_step

    def sample_and_step(self, group: int) -> None:
        self.sample()
        self.step(group)

    def masters(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def gradients(self) -> Iterator[Tensor | None]:
        yield from (parameter.grad for parameter in self.parameters)
        yield from (master.grad for master in self.masters())
        if self.stage == 3:
            yield self.zero.grad_partitions_flat_buffer
            return
        yield self.zero.grads_in_partition
        for kept in (self.zero.all_grad_tensors, self.zero.averaged_gradients):
            for tensors in kept.values():
                yield from tensors or []

    def buffers(self) -> Iterator[Tensor]:
        for bucket in self.zero.ipg_buckets.values():
            yield from [bucket.buffer] if self.stage == 3 else bucket.buffer
        if self.stage == 3:
            yield from (parameter.data for parameter in self.parameters if not parameter.ds_persist)

    def sample(self, incoming: int = 0) -> None:
        buffers = storages(self.buffers())
        gradients = sum(bytes_ for address, bytes_ in storages(self.gradients()).items() if address not in buffers)
        self.gradients_peak = max(self.gradients_peak, gradients + incoming)
        self.buffers_peak = max(self.buffers_peak, sum(buffers.values()))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == STEADY and batch_idx % trainer.accumulate_grad_batches == 0:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if trainer.global_step > STEADY:
            self.counter.__exit__(None, None, None)
            self.write()

    def write(self) -> None:
        shards = [parameter.ds_tensor for parameter in self.parameters] if self.stage == 3 else []
        parameters = storages([*shards, *self.parameters])
        states = [value for state in self.zero.optimizer.state.values() for value in state.values()]
        moments = storages(value for value in states if isinstance(value, Tensor) and value.numel() > 1)
        optimizer = {**storages(self.masters()), **moments}
        sent: dict[str, int] = {}
        for key, count in self.counter.counts.items():
            sent[key.collective] = sent.get(key.collective, 0) + count.payload_bytes
        report = {
            "parameters": sum(parameters.values()),
            "optimizer": sum(bytes_ for address, bytes_ in optimizer.items() if address not in parameters),
            "gradients": self.gradients_peak,
            "buffers": self.buffers_peak,
            "counted": sent,
        }
        self.path.write_text(json.dumps(report))


def census_rank(job: Job) -> None:
    train(job, callbacks=[Census(job.run_dir)])


Count = Callable[..., tuple[Job, Workload, ModelStats, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Count:
    """(job, workload, stats, one report per rank) of a run, made once for all tests that ask for it."""
    made: dict[tuple[object, ...], Any] = {}

    def run(strategy: str, ranks: int, accumulation: int, *overrides: str) -> Any:
        key = (strategy, ranks, accumulation, *overrides)
        if key not in made:
            folder = tmp_path_factory.mktemp("census")
            batch = f"data.micro_batch_size={24 // ranks // accumulation}"
            words = [*DEEP_ODD, batch, f"strategy={strategy}", f"launcher.devices={ranks}", *overrides]
            job = Job.of(resolve(validate(compose([*words, f"run_dir='{folder}'"]))))
            job.data.prepare()
            run_job(job, census_rank, job)
            reports = [json.loads((folder / f"census{rank}.json").read_text()) for rank in range(ranks)]
            moments = 1 if "optimizer=sgd" in overrides else 2
            workload = Workload(precision=job.config.precision, accumulation=accumulation, moments=moments)
            made[key] = job, workload, stats_of(job), reports
        return made[key]

    return run


RUNS: list[tuple[Any, ...]] = [
    *((stage, ranks, 1) for stage in ("zero1", "zero2", "zero3") for ranks in (2, 4)),
    ("zero1", 4, 3),
    ("zero2", 4, 3),
    ("zero3", 2, 3, "strategy.unit=module", "model.net.tie_embeddings=true"),
    ("zero1", 2, 1, "precision=bf16_master", "optimizer=sgd", "optimizer.lr=0.01"),
    ("zero2", 2, 3, "precision=bf16_master"),
    ("zero3", 2, 1, "precision=bf16_master", "strategy.bucket_mb=0.02"),
    ("zero3", 2, 1, "strategy.activation_checkpointing=full"),
    ("zero2", 2, 1, "strategy.reduce_to_owner=true", "strategy.communication_dtype=bfloat16"),
]
names = partial(pytest.mark.parametrize, "run", RUNS, ids=lambda run: "-".join(map(str, run)))


@names()
def test_held_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    job, workload, stats, reports = count(*run)
    expected = job.strategy.memory(stats, workload)
    for category in ("parameters", "optimizer", "gradients", "buffers"):
        most = max(report[category] for report in reports)
        assert most == pytest.approx(getattr(expected, category), rel=0.02), category


@names()
def test_sent_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    job, workload, stats, reports = count(*run)
    expected = {transfer.collective: transfer.payload for transfer in job.strategy.traffic(stats, workload)}
    for report in reports:
        for collective, payload in expected.items():
            assert report["counted"][collective] == pytest.approx(payload, rel=0.01), collective
        # What is left are norms and flags.
        assert sum(report["counted"].values()) < 1.01 * sum(expected.values())


def test_stages_hold_less_and_less(count: Count) -> None:
    one, two, three = (
        {category: max(report[category] for report in count(f"zero{stage}", 4, 1)[3]) for category in CATEGORIES}
        for stage in (1, 2, 3)
    )
    assert one["optimizer"] == two["optimizer"]
    assert one["parameters"] == two["parameters"] > 3.5 * three["parameters"]


CATEGORIES: tuple[Literal["parameters"], Literal["optimizer"]] = ("parameters", "optimizer")


def test_stage_2_holds_fewer_gradients_than_stage_1(count: Count) -> None:
    one, two = (max(report["gradients"] for report in count(f"zero{stage}", 4, 3)[3]) for stage in (1, 2))
    assert two < 0.8 * one


def test_stage_3_sends_half_as_much_again_as_data_parallelism(count: Count) -> None:
    """3 P against 2 P on the wire, by what was counted."""
    _, _, stats, reports = count("zero3", 4, 1)
    kinds: tuple[Any, ...] = ("all_gather", "reduce_scatter")
    for report in reports:
        sent = [Transfer(collective=kind, axis="data", ranks=4, payload=report["counted"][kind]) for kind in kinds]
        data_parallel = Transfer(collective="all_reduce", axis="data", ranks=4, payload=4 * stats.parameters)
        assert sum(transfer.wire_bytes for transfer in sent) == pytest.approx(1.5 * data_parallel.wire_bytes, rel=0.02)


def test_layers_are_gathered_a_third_time_for_forwards_that_run_again(count: Count) -> None:
    words = "strategy.unit=module", "strategy.activation_checkpointing=full"
    job, workload, stats, reports = count("zero3", 2, 1, *words)
    most = {transfer.collective: transfer.payload for transfer in job.strategy.traffic(stats, workload)}
    for report in reports:  # all but the last layer of each block, which is still there, and what is in no block
        assert 0.8 * most["all_gather"] < report["counted"]["all_gather"] <= most["all_gather"]


def test_prefetching_sends_no_more_than_the_spec_says(count: Count) -> None:
    job, workload, stats, reports = count("zero3", 2, 1, "strategy.prefetch_mb=0.05")
    most = {transfer.collective: transfer.payload for transfer in job.strategy.traffic(stats, workload)}
    assert all(report["counted"]["all_gather"] <= most["all_gather"] for report in reports)
    assert max(report["buffers"] for report in reports) <= job.strategy.memory(stats, workload).buffers
