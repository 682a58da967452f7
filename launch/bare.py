"""Training loops of few lines, as one writes them without Concord; each step runs after one of the Trainer's."""

from __future__ import annotations

import copy
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
from launch.worker import build_model
from strategies.engines.construction import constructing
from strategies.engines.materialize import materialize

LOSS_TOLERANCE = 1e-4  # nats; float32 sums in another order leave about 1e-6


def batches(data: SampledData, rank: int, data_ranks: int) -> Iterator[Tensor]:
    """The micro-batches of one data rank, gathered as a bare loop would: from the memory map, in the run's order."""
    samples = data.train_samples()
    order = Order(num_samples=len(samples), global_batch_size=data.global_batch_size, seed=data.seed)
    for step in count():
        indices = np.array_split(order.step_indices(step), data_ranks)[rank]
        yield torch.from_numpy(samples.batch(indices)[0])


def now(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class BareLoop(pl.Callback, ABC):
    """After each step of the Trainer's, one step of the same net, data and optimizer in a loop of few lines.

    Both must be at the same loss at every step: RuntimeError if not, for then they are not at the same work.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trainer_s: list[float] = []
        self.bare_s: list[float] = []

    def spread(self, net: nn.Module, engine: Any) -> nn.Module:
        """What this rank trains of a net that holds its first weights, before there is an optimizer."""
        return net

    @abstractmethod
    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        """Take what `spread` gave, and its optimizer; `config` is what the strategy gave its engine."""

    @abstractmethod
    def bare_step(self, batch: Tensor) -> Tensor | None:
        """Forward, backward and optimizer step on one batch of tokens [batch, time + 1]; the loss where it is known."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine: Any = trainer.strategy
        module: Any = build_model(self.job.config)
        with constructing(module):
            module.configure_model()
        self.device = engine.root_device
        materialize(module, self.device, self.job.config.seed)
        module.net = self.spread(module.net, engine)
        optimizers = module.configure_optimizers()
        self.scheduler = optimizers["lr_scheduler"]["scheduler"]
        self.make(module.net, optimizers["optimizer"], copy.deepcopy(getattr(engine, "config", {})))
        assert isinstance(self.job.data, SampledData)
        share = engine.distributed_sampler_kwargs
        self.batches = batches(self.job.data, share["rank"], share["num_replicas"])
        self.mark = now(self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        began = now(self.device)
        self.trainer_s.append(began - self.mark)
        loss = self.bare_step(next(self.batches).to(self.device))
        self.scheduler.step()
        self.bare_s.append(now(self.device) - began)
        if loss is not None:
            self.compare(float(outputs["loss"]), float(loss))
        self.mark = now(self.device)

    def compare(self, ours: float, bare: float) -> None:
        if not abs(ours - bare) < LOSS_TOLERANCE:
            raise RuntimeError(
                f"step {len(self.bare_s)}: the Trainer's loss is {ours:.6f}, the bare loop's {bare:.6f}; they do not "
                f"do the same work, and times say nothing."
            )


class BareDDP(BareLoop):
    """Plain PyTorch."""

    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        self.net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        self.optimizer = optimizer

    def bare_step(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.net(batch[:, :-1], targets=batch[:, 1:])
        loss.backward()
        clip_norm = self.job.config.trainer.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip_norm)
        self.optimizer.step()
        return loss.detach()


class BareDeepSpeed(BareLoop):
    """Plain DeepSpeed, with the very configuration that our engine has made."""

    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        import deepspeed

        leaves = config["zero_optimization"].get("leaf_module", {"names": []})
        leaves["names"] = [name.removeprefix("net.") for name in leaves["names"]]  # the bare engine has the net itself
        self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)

    def bare_step(self, batch: Tensor) -> Tensor:
        loss = self.engine(batch[:, :-1], targets=batch[:, 1:])
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()
