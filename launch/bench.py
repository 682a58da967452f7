"""What Concord's Trainer costs: its steps and those of a bare PyTorch loop, interleaved in the same processes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datamodules.order import Order
from datamodules.spec import SampledData
from launch.job import Job
from launch.worker import build_model, train
from strategies.engines.materialize import materialize

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


class BareLoop(pl.Callback):
    """After each step of the Trainer's, one step of the same model, data and optimizer in plain PyTorch."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trainer_s: list[float] = []
        self.bare_s: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        config = self.job.config
        module: Any = build_model(config)
        module.configure_model()
        materialize(module, trainer.strategy.root_device, config.seed)
        self.net = DistributedDataParallel(module.net, gradient_as_bucket_view=True)
        optimizers = module.configure_optimizers()
        self.optimizer, self.scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
        assert isinstance(self.job.data, SampledData)
        self.batches = batches(self.job.data, trainer.global_rank, trainer.world_size)
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        began = now(trainer.strategy.root_device)
        self.trainer_s.append(began - self.mark)
        self.bare_step()
        self.mark = now(trainer.strategy.root_device)
        self.bare_s.append(self.mark - began)

    def bare_step(self) -> None:
        batch = next(self.batches).to(next(self.net.parameters()).device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.net(batch[:, :-1], targets=batch[:, 1:])
        loss.backward()
        clip_norm = self.job.config.trainer.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip_norm)
        self.optimizer.step()
        self.scheduler.step()


def measure_overhead(job: Job) -> None:
    """Train `job` on this rank beside a bare loop; rank 0 prints both medians and their ratio."""
    if job.accumulation != 1 or job.strategy.name != "ddp" or job.config.precision.name != "fp32":
        raise ValueError("bench overhead compares strategy=ddp, precision=fp32, accumulation 1; leave them so.")
    bare = BareLoop(job)
    train(job, callbacks=[bare])
    if int(os.environ["RANK"]) == 0:
        trainer_ms, bare_ms = (1e3 * statistics.median(times[WARMUP_STEPS:]) for times in (bare.trainer_s, bare.bare_s))
        print(
            f"overhead: {len(bare.bare_s) - WARMUP_STEPS} steps each, interleaved; median step with Concord's Trainer "
            f"{trainer_ms:.1f} ms, bare PyTorch {bare_ms:.1f} ms, ratio {trainer_ms / bare_ms:.3f}",
            flush=True,
        )
