"""Training and evaluation steps of a LightningModule whose net lies in pipeline stages."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves, tree_map

from strategies.engines import sharding
from strategies.engines.pipeline import Pipeline, order_of
from strategies.engines.relay import Entry, LogRelay, NetCall, merge
from strategies.schedules import Order, forward_only, rank_of, with_transfers

if TYPE_CHECKING:
    from strategies.grid import Grid


class PipelinedSteps:
    """Cuts batches into micro-batches, takes them through the pipeline, and lets every rank know loss and logs."""

    def __init__(
        self,
        module: pl.LightningModule,
        net: nn.Module,
        pipeline: Pipeline,
        spec: Grid,
        data_group: dist.ProcessGroup,
        *,
        seed: int,
        forward_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.module, self.pipeline, self.spec = module, pipeline, spec
        self.data_group, self.seed, self.forward_context = data_group, seed, forward_context
        self.net_call = NetCall(net, type(module).__name__)
        last = spec.num_stages - 1
        self.pipe_rank = dist.get_group_rank(pipeline.link.group, dist.get_rank())
        self.last_unit = pipeline.stages[last].units[-1] if last in pipeline.stages else None
        self.relay = LogRelay(module, pipeline.link.group, pipeline.link.peer(last), pipeline.link.device)
        self.sharded_roots = [stage for stage in pipeline.stages.values() if isinstance(stage, FSDPModule)]
        self.buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]

    def train(self, batch: Any, *rest: Any) -> Tensor:
        """The step's mean loss, on every rank; its gradients are in the parameters, to be reduced yet."""
        for root in self.sharded_roots:
            sharding.hold(root)
        self.share_buffers()
        parts, weights = split(batch, self.spec.micro_batches)
        accumulation = self.module.trainer.accumulate_grad_batches
        step = self.module.training_step
        losses: list[Tensor] = []
        logged: list[list[Entry]] = []

        def last(micro: int, output: Any) -> Tensor:
            with self.relay.recording() as entries, self.same_draws(micro):
                result = self.finish(partial(step, parts[micro], *rest), output)
            logged.append(entries)
            loss = loss_in(result, type(self.module).__name__)
            losses.append(loss.detach() * weights[micro])
            return loss * (weights[micro] / accumulation)

        self.run(train_order(self.spec, len(parts)), parts, step, rest, last, key=("train", signature(batch)))
        merged = merge(logged, weights, type(self.module).__name__) if logged else []
        loss = self.relay.replay(merged, loss=float(sum(losses)))
        return torch.tensor(loss, device=self.pipeline.link.device)

    def evaluate(self, step: Callable[..., Any], batch: Any, *rest: Any) -> Any:
        """What `step` returns, on the ranks of the last stage; it is called once, with the whole batch."""
        self.share_buffers()
        parts, _ = split(batch, self.spec.micro_batches)
        outputs: list[Any] = []
        self.run(
            forward_order(self.spec, len(parts)),
            parts,
            step,
            rest,
            lambda _, output: outputs.append(output),
            key=("evaluate", signature(batch)),
        )
        result, entries = None, []
        if outputs:
            joined = joined_outputs(outputs)
            with self.relay.recording() as entries, self.forward_context(), self.same_draws(0):
                result = self.finish(partial(step, batch, *rest), joined)
        self.relay.replay(entries)
        return result

    def run(
        self,
        order: Order,
        parts: list[Any],
        step: Callable[..., Any],
        rest: tuple[Any, ...],
        last: Callable[[int, Any], Tensor | None],
        *,
        key: object,
    ) -> None:
        self.pipeline.run(
            order[self.pipe_rank],
            key=key,
            first=lambda micro: self.arguments(partial(step, parts[micro], *rest), micro),
            last=last,
            context=self.forward_context,
        )

    def arguments(self, step: Callable[[], Any], micro: int) -> tuple[Any, ...]:
        with self.relay.recording(), self.same_draws(micro):
            return self.net_call.arguments(step)

    @contextmanager
    def same_draws(self, micro: int) -> Iterator[None]:
        """A step runs on the first and on the last stage's rank: what it draws at random must be the same on both."""
        trainer = self.module.trainer
        place = (trainer.global_step, trainer.fit_loop.batch_idx, micro, dist.get_rank(self.data_group))
        seed = zlib.crc32(repr((self.seed, *place)).encode())
        with isolate_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield

    def finish(self, step: Callable[[], Any], output: Any) -> Any:
        assert self.last_unit is not None
        return self.net_call.finish(step, self.last_unit, output)

    def reduce_gradients(self) -> None:
        for root in self.sharded_roots:
            sharding.reduce_gradients(root)

    def share_buffers(self) -> None:
        """The first data rank's buffers go to all, as under DDP: statistics of a BatchNorm are one rank's."""
        for buffer in self.buffers if self.spec.mesh.data_ranks > 1 else []:
            dist.broadcast(buffer, group_src=0, group=self.data_group)


def signature(batch: Any) -> tuple[torch.Size, ...]:
    """What the shapes of all that passes between stages follow from."""
    return tuple(leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def split(batch: Any, parts: int) -> tuple[list[Any], list[float]]:
    """A batch as at most `parts` micro-batches, and the share of samples in each. Sizes differ by at most one."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise ValueError("strategy.mesh.pipe: a batch without a tensor cannot be cut into micro-batches.")
    size = len(tensors[0])
    count = min(parts, size)

    def cut(leaf: Any) -> tuple[Any, ...]:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size:
            return leaf.tensor_split(count)
        return (leaf,) * count

    micro_batches = [tree_map(lambda leaf, i=i: cut(leaf)[i], batch) for i in range(count)]
    sizes = [len(part) for part in tensors[0].tensor_split(count)]
    return micro_batches, [part / size for part in sizes]


def train_order(spec: Grid, micro_batches: int) -> Order:
    order = order_of(spec.schedule, spec.pipe, spec.rank_stages, micro_batches)
    return with_transfers(order, spec.num_stages, lambda stage: rank_of(stage, spec.pipe, spec.kind))


def forward_order(spec: Grid, micro_batches: int) -> Order:
    order = forward_only(spec.pipe, spec.num_stages, micro_batches, spec.kind)
    return with_transfers(order, spec.num_stages, lambda stage: rank_of(stage, spec.pipe, spec.kind))


def joined_outputs(outputs: list[Any]) -> Any:
    """The outputs of all micro-batches as that of one batch."""
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(same) for same in zip(*outputs, strict=True))
    return torch.cat(outputs)


def loss_in(result: Any, owner: str) -> Tensor:
    """The loss among what a training step returns."""
    loss = result["loss"] if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"strategy.mesh.pipe: {owner}.training_step returns {type(loss).__name__} instead of a loss; return a "
            f"tensor for every batch, or choose strategy=fsdp."
        )
    return loss
