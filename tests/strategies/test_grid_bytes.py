"""What a grid's ranks really hold and send, counted, against what the spec says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from torch import Tensor

from launch.compose import compose
from launch.job import Job, resolve
from launch.schema import validate
from launch.worker import train
from models.stats import ModelStats
from strategies import grid_costs
from strategies.engines import grid as engine
from strategies.engines import shards
from strategies.engines.sharding import sharded_parts
from strategies.grid import Grid
from strategies.grid_layout import Layout
from strategies.spec import Workload
from tests.agreement.training import run_job
from tests.strategies.counting import EVEN, ODD, stats_of
from tracking.traffic import TrafficCounter

STEADY = 1  # optimizer steps before the one that is counted: the first also tells shapes and names
GLOBAL_BATCH = 16
COMMON = [
    f"trainer.max_steps={STEADY + 1}",
    "trainer.val_every_steps=null",
    "trainer.log_every_steps=1000",
    "data.max_val_samples=4",
    f"data.global_batch_size={GLOBAL_BATCH}",
    "logger=none",
    "launcher.accelerator=cpu",
]
VIT = ["model=vit_tiny", "data=digits", "model.net.num_heads=2", "model.net.hidden_size=32", "model.net.mlp_size=64"]
GPT2 = ["model.net.norm=layer", "model.net.mlp=gelu", "model.net.bias=true", "model.net.positions=learned"]
GPT2 += ["+model.net.max_sequence_length=16"]
TIED = "model.net.tie_embeddings=true"

pytestmark = pytest.mark.full


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address of what these tensors hold on this rank, each storage once."""
    local = [shards.local(tensor) for tensor in tensors if tensor is not None]
    held = [tensor.untyped_storage() for tensor in local if tensor.numel()]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


class Census(pl.Callback):
    """Counts the bytes of one rank in the run's last step, by what the engine and FSDP2 hold on to."""

    def __init__(self, job: Job) -> None:
        self.path = job.run_dir / f"census{os.environ['RANK']}.json"
        self.counter = TrafficCounter()
        self.counts = False
        self.gradients_peak = self.buffers_peak = 0
        assert isinstance(job.strategy, Grid)
        self.spec = job.strategy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(trainer.strategy, engine.GridEngine)
        self.module, self.engine = pl_module, trainer.strategy
        steps = self.engine.steps
        parts = sharded_parts(pl_module) + (steps.sharded_roots if steps else [])
        self.groups: list[Any] = list(
            dict.fromkeys(group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups)
        )
        self.sharded: list[Any] = [parameter for group in self.groups for parameter in group.fsdp_params]
        # Where weights or gradients come or go.
        places = [(type(self.groups[0]), name) for name in ("unshard", "_to_unsharded", "post_backward") if self.groups]
        for owner, name in [*places, (engine.GridEngine, "finish_gradients")]:
            setattr(owner, name, self.sampled(getattr(owner, name)))
        trainer.optimizers[0].register_step_pre_hook(lambda *_: self.sample())
        self.all_reduce, self.batch = shards.dist.all_reduce, shards.dist.batch_isend_irecv
        shards.dist.all_reduce, shards.dist.batch_isend_irecv = self.watched_all_reduce, self.watched_batch  # type: ignore[assignment]

    def sampled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def sampling(*args: Any, **kwargs: Any) -> Any:
            self.sample()
            result = function(*args, **kwargs)
            self.sample()
            return result

        return sampling

    def watched_all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Gradients are flattened into a buffer of their own."""
        if self.counts and self.spec.shards == 1:
            self.buffers_peak = max(self.buffers_peak, tensor.nbytes)
        return self.all_reduce(tensor, *args, **kwargs)

    def watched_batch(self, operations: list[Any]) -> Any:
        """Only a shared parameter's gradients go in batches: the others' are added to this rank's."""
        if self.counts:
            for operation in operations:
                if operation.op is shards.dist.irecv:
                    self.buffers_peak = max(self.buffers_peak, 2 * operation.tensor.nbytes)
        return self.batch(operations)

    def gradients(self) -> Iterator[Any]:
        yield from (parameter.grad for parameter in self.module.parameters())
        yield from (parameter.grad for group in self.engine.optimizers[0].param_groups for parameter in group["params"])
        yield from (group._partial_reduce_output for group in self.groups)
        for parameter in self.sharded:
            yield from (parameter.sharded_param.grad, parameter.unsharded_accumulated_grad)
            yield parameter._unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None

    def buffers(self) -> Iterator[Any]:
        yield from (tensor for parameter in self.sharded for tensor in parameter.all_gather_outputs)
        for group in self.groups:
            arriving = group.comm_ctx.all_gather_state and group.comm_ctx.all_gather_state.all_gather_result
            yield from (result.all_gather_output for result in (group._all_gather_result, arriving) if result)
            yield from (state.reduce_scatter_input for state in group.comm_ctx.reduce_scatter_states)

    def sample(self) -> None:
        if not self.counts:
            return
        self.gradients_peak = max(self.gradients_peak, sum(storages(self.gradients()).values()))
        self.buffers_peak = max(self.buffers_peak, sum(storages(self.buffers()).values()))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if trainer.global_step == STEADY and not self.counts:
            self.counts = True
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if trainer.global_step > STEADY:
            self.counter.__exit__(None, None, None)
            self.write()

    def write(self) -> None:
        whole = [parameter for parameter in self.module.parameters() if not engine.is_sharded(parameter)]
        mine = {id(parameter._unsharded_param) for parameter in self.sharded}
        parameters = storages(parameter._sharded_param_data for parameter in self.sharded)
        parameters |= storages(parameter for parameter in whole if id(parameter) not in mine)
        (optimizer,) = self.engine.optimizers
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
        held = storages([*stepped, *states])
        sent: dict[str, int] = {}
        for key, count in self.counter.counts.items():
            name = f"{key.collective} {self.axis(key.ranks)} {len(key.ranks)}"
            sent[name] = sent.get(name, 0) + count.payload_bytes
        report = {
            "parameters": sum(parameters.values()),
            "optimizer": sum(bytes_ for address, bytes_ in held.items() if address not in parameters),
            "gradients": self.gradients_peak,
            "buffers": self.buffers_peak,
            "sent": sent,
        }
        self.path.write_text(json.dumps(report))

    def axis(self, ranks: tuple[int, ...]) -> str:
        """The mesh axis along which a group's ranks lie; `world` for several."""
        sizes = (self.spec.pipe, self.spec.mesh.data_ranks, self.spec.tensor)
        places = np.array(np.unravel_index(ranks, sizes))
        (varying,) = np.nonzero(places.min(axis=1) != places.max(axis=1))
        return ("pipe", "data", "tensor")[varying[0]] if len(varying) == 1 else "world"


def census_rank(job: Job) -> None:
    train(job, callbacks=[Census(job)])


Count = Callable[..., tuple[Grid, Workload, ModelStats, list[list[dict[str, Any]]]]]


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Count:
    """(grid, workload, stats, reports by pipe rank) of a run, made once for all tests that ask for it."""
    made: dict[tuple[object, ...], Any] = {}

    def run(strategy: str, mesh: str, accumulation: int, *overrides: str) -> Any:
        key = (strategy, mesh, accumulation, *overrides)
        if key not in made:
            folder = tmp_path_factory.mktemp("census")
            pipe, data, tensor = map(int, mesh.split("x"))
            words = [
                *([] if "model=vit_tiny" in overrides else EVEN if tensor > 1 else ODD),
                *COMMON,
                f"data.micro_batch_size={GLOBAL_BATCH // data // accumulation}",
                f"strategy={strategy}",
                f"strategy.mesh={{pipe:{pipe},data:{data},tensor:{tensor}}}",
                f"run_dir='{folder}'",
            ]
            job = Job.of(resolve(validate(compose([*words, *overrides]))))
            job.data.prepare()
            ranks = pipe * data * tensor
            run_job(job, census_rank, job)
            reports = [json.loads((folder / f"census{rank}.json").read_text()) for rank in range(ranks)]
            workload = Workload(
                precision=job.config.precision,
                accumulation=accumulation,
                micro_batch_size=job.data.micro_batch_size,
                moments=1 if "optimizer=sgd" in overrides else 2,
            )
            of_stage = data * tensor
            by_pipe = [reports[first : first + of_stage] for first in range(0, ranks, of_stage)]
            made[key] = job.strategy, workload, stats_of(job), by_pipe
        return made[key]

    return run


# The mesh is pipe x data x tensor; then accumulation.
RUNS: list[tuple[Any, ...]] = [
    ("fsdp", "1x2x1", 1),
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
    ("2d", "1x2x2", 2),
    ("2d_pipeline", "2x2x1", 2, TIED, "strategy.reshard_after_forward=true"),
    ("3d", "2x2x2", 1, TIED, "strategy.schedule=zbv", "strategy.micro_batches=2"),
]
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{run[1]}")


@each_run
def test_held_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    grid, workload, stats, by_pipe = count(*run)
    # A parameter that stands in two places has a gradient when both have given theirs; till then autograd keeps it.
    unseen = sum(stats.reused) * 4 if grid.shards > 1 and grid.pipe == 1 else 0
    for pipe_rank, reports in enumerate(by_pipe):
        expected = grid_costs.rank_memory(Layout(grid, stats), workload, pipe_rank)
        for category in ("parameters", "optimizer", "gradients", "buffers"):
            most = max(report[category] for report in reports)
            close = pytest.approx(getattr(expected, category), rel=0.02, abs=64)
            assert most == close or (category == "gradients" and unseen and most + unseen == close), category


@each_run
def test_sent_bytes_are_the_specs(run: tuple[Any, ...], count: Count) -> None:
    grid, workload, stats, by_pipe = count(*run)
    for pipe_rank, reports in enumerate(by_pipe):
        transfers = grid_costs.rank_traffic(Layout(grid, stats), workload, pipe_rank)
        expected = {f"{sent.collective} {sent.axis} {sent.ranks}": sent.payload for sent in transfers}
        for report in reports:
            sent = report["sent"]
            # Left out: the gradient's norm, the pipeline's loss and logs, how far each rank's data has come.
            assert sum(payload for key, payload in sent.items() if key not in expected) < 0.01 * sum(expected.values())
            for key, payload in expected.items():
                assert sent[key] == pytest.approx(payload, rel=0.01), key


@each_run
def test_a_strategys_figures_are_those_of_its_busiest_rank(run: tuple[Any, ...], count: Count) -> None:
    grid, workload, stats, by_pipe = count(*run)
    layout = Layout(grid, stats)
    totals = [grid_costs.rank_memory(layout, workload, pipe_rank).total for pipe_rank in range(grid.pipe)]
    assert grid.memory(stats, workload).total == max(totals)
    payloads = [sum(report["sent"].values()) for reports in by_pipe for report in reports]
    assert sum(sent.payload for sent in grid.traffic(stats, workload)) > 0.98 * max(payloads)
