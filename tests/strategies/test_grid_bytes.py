"""What a grid's ranks really hold and send, counted, against what the spec says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from datamodules.loading import BatchDataset
from datamodules.spec import SampledData
from launch.compose import compose
from launch.job import Job, resolve
from launch.schema import validate
from launch.worker import build_model, train
from models.stats import ModelStats, measure
from strategies import grid_costs
from strategies.engines import grid as engine
from strategies.engines.sharding import sharded_parts
from strategies.grid import Grid
from strategies.spec import Workload
from tests.harness import run_ranks
from tracking.traffic import TrafficCounter

STEADY = 1  # optimizer steps before the one that is counted: the first also tells shapes and names
GLOBAL_BATCH = 24
COMMON = [
    f"trainer.max_steps={STEADY + 1}",
    "trainer.val_every_steps=null",
    "trainer.log_every_steps=1000",
    "data.max_val_samples=4",
    f"data.global_batch_size={GLOBAL_BATCH}",
    "logger=none",
    "launcher.accelerator=cpu",
]
ODD = [  # sizes that no number of ranks divides
    "model=gpt_tiny",
    "model.net.num_layers=6",
    "model.net.num_heads=3",
    "model.net.num_kv_heads=1",
    "model.net.hidden_size=42",
    "model.net.mlp_size=97",
    "data=text",
    "data.sequence_length=16",
]
EVEN = [*ODD, "model.net.num_heads=4", "model.net.num_kv_heads=4", "model.net.hidden_size=56", "model.net.mlp_size=100"]
VIT = ["model=vit_tiny", "model.net.num_layers=3", "model.net.num_heads=4", "data=digits"]
TIED = "model.net.tie_embeddings=true"


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address of what these tensors hold on this rank, each storage once."""
    local = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    held = [tensor.untyped_storage() for tensor in local if tensor is not None and tensor.numel()]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


class Census(pl.Callback):
    """Counts the bytes of one rank in the run's last step, by what the engine and FSDP2 hold on to."""

    def __init__(self, job: Job) -> None:
        self.path = job.run_dir / f"census{os.environ['RANK']}.json"
        self.counter = TrafficCounter()
        self.counts = False
        self.gradients_peak = self.buffers_peak = self.flat = 0
        assert isinstance(job.strategy, Grid)
        self.spec = job.strategy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.module, self.engine = pl_module, trainer.strategy
        assert isinstance(self.engine, engine.GridEngine)
        steps = self.engine.steps
        parts = sharded_parts(pl_module) + (steps.sharded_roots if steps else [])
        self.groups: list[Any] = list(
            dict.fromkeys(group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups)
        )
        self.sharded: list[Any] = [parameter for group in self.groups for parameter in group.fsdp_params]
        # Where weights or gradients come or go.
        for owner, name in [
            (FSDPParamGroup, "unshard"),
            (FSDPParamGroup, "_to_unsharded"),
            (FSDPParamGroup, "post_backward"),
            (engine.GridEngine, "finish_gradients"),
        ]:
            setattr(owner, name, self.sampled(getattr(owner, name)))
        trainer.optimizers[0].register_step_pre_hook(lambda *_: self.sample())
        self.all_reduce, self.irecv = dist.all_reduce, dist.irecv
        dist.all_reduce, dist.irecv = self.watched_all_reduce, self.watched_irecv

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

    def watched_irecv(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.counts and "tag" in kwargs:  # a shared parameter's gradient, to be added to this rank's
            self.buffers_peak = max(self.buffers_peak, 2 * tensor.nbytes)
        return self.irecv(tensor, *args, **kwargs)

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


def stats_of(job: Job) -> ModelStats:
    model = build_model(job.config)
    model.configure_model()
    assert isinstance(job.data, SampledData)
    return measure(model, BatchDataset(job.data.train_samples())[np.zeros(1, dtype=np.int64)])
