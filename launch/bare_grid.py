"""Bare loops with torch's own FSDP2, tensor and pipeline parallelism, as torchtitan writes them, for our GPT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist  # what Concord's engines are measured against
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from launch.bare import BareLoop
from launch.job import Job
from strategies.engines.tensor import whole
from strategies.grid import Grid


def shard_blocks(net: Any, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def whole_to(placement: Shard) -> PrepareModuleInput:
    """Gathers the input of a module whose linears each take all of it."""
    return PrepareModuleInput(input_layouts=(placement,), desired_input_layouts=(Replicate(),))


def split_matrices(net: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism with the sequence split between blocks, and logits split over the vocabulary."""
    block_plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": whole_to(Shard(1)),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": whole_to(Shard(1)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in net.blocks:
        parallelize_module(block, mesh, block_plan)
    plan: dict[str, ParallelStyle] = {
        "embed.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": whole_to(Shard(1)),
        "head.logits": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(net, mesh, plan)


class BareGrid(BareLoop, ABC):
    """One optimizer for all that `spread` leaves to this rank, and clipping by the norm over all ranks."""

    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        self.net, self.optimizer = net, optimizer

    @abstractmethod
    def gradients(self, batch: Tensor) -> Tensor | None:
        """Forward and backward; the loss where it is known."""

    def norm(self) -> Tensor:
        return whole(torch.nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None]))

    def bare_step(self, batch: Tensor) -> Tensor | None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(batch)
        clip_norm = self.job.config.trainer.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.net.parameters(), clip_norm, self.norm())
        self.optimizer.step()
        return loss


class BareShards(BareGrid):
    """FSDP2, tensor parallelism, or the one around the other."""

    def spread(self, net: nn.Module, engine: Any) -> nn.Module:
        data, tensor = self.job.mesh.data_ranks, self.job.mesh.world_size // self.job.mesh.data_ranks
        mesh = init_device_mesh(self.device.type, (data, tensor), mesh_dim_names=("data", "tensor"))
        if tensor > 1:
            split_matrices(net, mesh["tensor"])
        if data > 1:
            shard_blocks(net, mesh["data"])
        return net

    def gradients(self, batch: Tensor) -> Tensor:
        # Under torch's `loss_parallel`, which our engine has entered; to leave a second one would end the first.
        loss = self.net(batch[:, :-1], targets=batch[:, 1:])
        loss.backward()
        return whole(loss.detach())


class BarePipeline(BareGrid):
    """torch's 1F1B, cut where our engine has cut."""

    def spread(self, net: nn.Module, engine: Any) -> nn.Module:
        (self.index,) = engine.steps.pipeline.stages
        names = engine.steps.pipeline.stages[self.index].names
        self.group = engine.pipe_group
        return nn.Sequential(OrderedDict((name.replace(".", "_"), net.get_submodule(name)) for name in names))

    def make(self, net: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> None:
        super().make(net, optimizer, config)
        assert isinstance(self.job.strategy, Grid)
        stages, self.micro_batches = self.job.strategy.num_stages, self.job.strategy.micro_batches
        self.is_first, self.is_last = self.index == 0, self.index == stages - 1
        stage = PipelineStage(net, self.index, stages, self.device, group=self.group)
        self.schedule = Schedule1F1B(
            stage,
            self.micro_batches,
            loss_fn=lambda logits, targets: cross_entropy(logits.flatten(0, 1), targets.flatten()),
        )

    def gradients(self, batch: Tensor) -> Tensor | None:
        tokens = (batch[:, :-1],) if self.is_first else ()
        losses: list[Tensor] = []
        self.schedule.step(
            *tokens, target=batch[:, 1:] if self.is_last else None, losses=losses if self.is_last else None,
            return_outputs=False,
        )  # fmt: skip
        return torch.stack(losses).mean().detach() if self.is_last else None

    def norm(self) -> Tensor:
        square = super().norm() ** 2
        dist.all_reduce(square, group=self.group)
        return square.sqrt()


def bare_grid(job: Job) -> BareGrid:
    """The loop that does what `job` does; ValueError where there is none."""
    grid = job.strategy
    assert isinstance(grid, Grid)
    alone = grid.pipe == 1 or grid.pipe == grid.mesh.world_size
    if not alone or grid.replicas != 1 or grid.cpu_offload or (grid.pipe > 1 and grid.schedule != "1f1b"):
        raise ValueError(
            f"bench has no bare loop for strategy={grid.name} as it is set; choose fsdp, tensor, 2d, or pipeline with "
            f"schedule=1f1b."
        )
    return BarePipeline(job) if grid.pipe > 1 else BareShards(job)
