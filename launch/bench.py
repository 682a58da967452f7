"""What Concord's Trainer costs: its steps and those of a bare loop, interleaved in the same processes."""

from __future__ import annotations

import copy
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from datamodules.order import Order
from datamodules.spec import SampledData
from launch.job import Job
from launch.worker import build_model, train
from strategies.engines.materialize import materialize
from strategies.replicate import DDP
from strategies.zero import Zero

WARMUP_STEPS = 3  # first steps build DDP's buckets, the optimizer's state and the allocator's pools


def batches(data: SampledData, rank: int, world_size: int) -> Iterator[Tensor]:
    """The micro-batches of one rank, gathered as a bare loop would: from the memory map, in the run's order."""
    samples = data.train_samples()
    order = Order(num_samples=len(samples), global_batch_size=data.global_batch_size, seed=data.seed)
    for step in count():
        indices = np.array_split(order.step_indices(step), world_size)[rank]
        yield torch.from_numpy(samples.batch(indices)[0])


def now(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class BareLoop(pl.Callback, ABC):
    """After each step of the Trainer's, one step of the same net, data and optimizer in a loop of few lines."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trainer_s: list[float] = []
        self.bare_s: list[float] = []

    @abstractmethod
    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        """Wrap a net that holds its first weights; `config` is what the strategy gave its engine."""

    @abstractmethod
    def bare_step(self, batch: Tensor) -> None:
        """Forward, backward and optimizer step on one batch of tokens [batch, time + 1]."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = build_model(self.job.config)
        module.configure_model()
        self.device = trainer.strategy.root_device
        materialize(module, self.device, self.job.config.seed)
        optimizers = module.configure_optimizers()
        self.scheduler = optimizers["lr_scheduler"]["scheduler"]
        self.make(module.net, optimizers["optimizer"], copy.deepcopy(getattr(trainer.strategy, "config", {})))
        assert isinstance(self.job.data, SampledData)
        self.batches = batches(self.job.data, trainer.global_rank, trainer.world_size)
        self.mark = now(self.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        began = now(self.device)
        self.trainer_s.append(began - self.mark)
        self.bare_step(next(self.batches).to(self.device))
        self.scheduler.step()
        self.mark = now(self.device)
        self.bare_s.append(self.mark - began)


class BareDDP(BareLoop):
    """Plain PyTorch."""

    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        self.net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        self.optimizer = optimizer

    def bare_step(self, batch: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.net(batch[:, :-1], targets=batch[:, 1:]).backward()
        clip_norm = self.job.config.trainer.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip_norm)
        self.optimizer.step()


class BareDeepSpeed(BareLoop):
    """Plain DeepSpeed, with the very configuration that our engine has made."""

    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        import deepspeed

        leaves = config["zero_optimization"].get("leaf_module", {"names": []})
        leaves["names"] = [name.removeprefix("net.") for name in leaves["names"]]  # the bare engine has the net itself
        self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)

    def bare_step(self, batch: Tensor) -> None:
        loss = self.engine(batch[:, :-1], targets=batch[:, 1:])
        self.engine.backward(loss)
        self.engine.step()


def measure_overhead(job: Job) -> None:
    """Train `job` on this rank beside a bare loop; rank 0 prints both medians and their ratio."""
    if job.accumulation != 1 or job.config.precision.name != "fp32":
        raise ValueError("bench compares precision=fp32 with accumulation 1; leave them so.")
    bare: BareLoop
    if isinstance(job.strategy, DDP):
        bare, other = BareDDP(job), "bare PyTorch"
    elif isinstance(job.strategy, Zero):
        bare, other = BareDeepSpeed(job), "bare DeepSpeed"
    else:
        raise ValueError(f"bench has no bare loop for strategy={job.strategy.name}; choose ddp or a zero preset.")
    train(job, callbacks=[bare])
    if int(os.environ["RANK"]) == 0:
        trainer_ms, bare_ms = (1e3 * statistics.median(times[WARMUP_STEPS:]) for times in (bare.trainer_s, bare.bare_s))
        print(
            f"{job.strategy.name}: {len(bare.bare_s) - WARMUP_STEPS} steps each, interleaved; median step with "
            f"Concord's Trainer {trainer_ms:.1f} ms, {other} {bare_ms:.1f} ms, ratio {trainer_ms / bare_ms:.3f}",
            flush=True,
        )
