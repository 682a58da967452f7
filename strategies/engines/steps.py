"""Training and evaluation steps of a LightningModule whose net lies in pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves, tree_map

from strategies.engines import sharding
from strategies.engines.draws import draws_of, seed_of
from strategies.engines.loss_terms import LossTerms, loss_of, times
from strategies.engines.outputs import check_output, is_by_rows, joined_rest, looked_at, refused, rest_of
from strategies.engines.pipeline import Pipeline, order_of, takes_gradient
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
        terms: LossTerms,
        *,
        seed: int,
        forward_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.module, self.pipeline, self.spec = module, pipeline, spec
        self.data_group, self.terms = data_group, terms
        self.seed, self.forward_context = seed, forward_context
        self.net_call = NetCall(net, type(module).__name__)
        last = spec.num_stages - 1
        self.pipe_rank = dist.get_group_rank(pipeline.link.group, dist.get_rank())
        self.last_unit = pipeline.stages[last].units[-1] if last in pipeline.stages else None
        self.first_unit = pipeline.stages[0].units[0] if 0 in pipeline.stages else None
        in_stages = [part for stage in pipeline.stages.values() for part in stage.modules()]
        self.relay = LogRelay(module, pipeline.link.group, pipeline.link.peer(last), pipeline.link.device, in_stages)
        self.sharded_roots = [stage for stage in pipeline.stages.values() if isinstance(stage, FSDPModule)]
        self.has_trained = False

    def train(self, batch: Any, *rest: Any) -> Tensor | dict[str, Any]:
        """The step's mean loss, on every rank, and what else it returned where somebody looks at that.

        Its gradients are in the parameters, to be reduced yet.
        """
        for root in self.sharded_roots:
            sharding.hold(root)
        parts, sizes = split(batch, self.spec.micro_batches)
        weights = [size / sum(sizes) for size in sizes]
        accumulation = self.module.trainer.accumulate_grad_batches
        step = self.module.training_step
        owner = type(self.module).__name__
        losses: list[Tensor] = []
        logged: list[list[Entry]] = []
        others: list[dict[str, Any]] = []
        odd: list[list[Any]] = []  # what an evaluation will have to join otherwise than by rows
        rows_of: list[int] = []

        def first(micro: int) -> tuple[tuple[Any, ...], int]:
            arguments = self.arguments(step, parts[micro], rest, place=("train", micro))
            return arguments, rows_in(arguments, sizes[micro])

        def last(micro: int, output: Any, rows: int) -> Tensor:
            if not self.has_trained:
                odd.append([kept_if_odd(part, rows) for part in tree_leaves(output)])
                rows_of.append(rows)
            with self.relay.recording() as entries, self.same_draws("train", micro):
                result = self.finish(partial(step, parts[micro], *rest), output)
            logged.append(entries)
            loss = self.loss_in(result)
            if self.shows_outputs:
                others.append(rest_of(result))
            if not self.has_trained:
                self.net_call.check_loss(loss)
            weight = self.terms.weight_of(result, share=weights[micro], samples=sum(sizes), group=self.data_group)
            loss = times(loss, weight)
            losses.append(loss.detach())
            return loss / accumulation

        self.run(train_order(self.spec, len(parts)), first, last)
        for same in zip(*odd, strict=True):
            if ByRows not in map(type, same):
                joined(same, rows_of, owner)  # it fails now rather than at the first validation
        self.has_trained = True
        merged = merge(logged, weights, owner) if logged else []
        loss = torch.tensor(self.relay.replay(merged, loss=float(sum(losses))), device=self.pipeline.link.device)
        if not self.shows_outputs:
            return loss
        return {**self.relay.shared(joined_rest(others, sizes, owner) if others else {}), "loss": loss}

    @cached_property
    def shows_outputs(self) -> bool:
        """Whether somebody looks at what training steps return."""
        return looked_at(self.module, "on_train_batch_end")

    @cached_property
    def shows_evaluations(self) -> bool:
        hooks = ("on_validation_batch_end", "on_test_batch_end", "on_predict_batch_end")
        return any(looked_at(self.module, hook) for hook in hooks)

    def loss_in(self, result: Any) -> Tensor:
        """The loss among what a training step returned."""
        if result is None:
            raise refused(self.module, "returns no loss", "return one for every batch, or choose strategy=single")
        check_output(self.module, result)
        return loss_of(result)

    def evaluate(self, step: Callable[..., Any], batch: Any, *rest: Any) -> Any:
        """What `step` returns, on the ranks of the last stage, and on all where somebody looks at it.

        It is called with the whole batch.

        Its net's arguments are cut into micro-batches, and the net's outputs joined.
        """
        sizes = sizes_of(batch, self.same_number(batch))
        loop: Any = self.module.trainer._active_loop
        place = (step.__name__, loop.batch_progress.current.ready)
        parts: list[tuple[Any, ...]] = []
        if self.first_unit is not None:
            with self.forward_context():
                parts = cut(self.arguments(step, batch, rest, place), sizes)
        outputs: list[Any] = []
        rows_of: list[int] = []

        def last(_: int, output: Any, rows: int) -> None:
            outputs.append(output)
            rows_of.append(rows)

        order = forward_order(self.spec, len(sizes))
        self.run(order, lambda micro: (parts[micro], rows_in(parts[micro], sizes[micro])), last)
        result, entries = None, []
        if outputs:
            joined = joined_outputs(outputs, rows_of, type(self.module).__name__)
            with self.relay.recording() as entries, self.forward_context(), self.same_draws(*place):
                result = self.finish(partial(step, batch, *rest), joined)
        self.relay.replay(entries)
        return self.relay.shared(result) if self.shows_evaluations else result

    def run(
        self,
        order: Order,
        first: Callable[[int], tuple[tuple[Any, ...], int]],
        last: Callable[[int, Any, int], Tensor | None],
    ) -> None:
        self.pipeline.run(order[self.pipe_rank], first=first, last=last, context=self.forward_context)

    def arguments(
        self, step: Callable[..., Any], batch: Any, rest: tuple[Any, ...], place: tuple[object, ...]
    ) -> tuple[Any, ...]:
        """What the step calls its net with."""
        assert self.first_unit is not None
        if self.last_unit is not None:
            batch = tree_map(copied, batch)  # the step runs here once more, and may change its batch in place
        with self.relay.recording(), self.same_draws(*place):
            return self.net_call.arguments(partial(step, batch, *rest), self.first_unit)

    @contextmanager
    def same_draws(self, *here: object) -> Iterator[None]:
        """A step runs on the first and on the last stage's rank: what it draws at random must be the same on both."""
        trainer = self.module.trainer
        place = (trainer.global_step, trainer.fit_loop.batch_idx, *here, dist.get_rank(self.data_group))
        with draws_of(seed_of(self.seed, *place), self.pipeline.link.device):
            yield

    def finish(self, step: Callable[[], Any], output: Any) -> Any:
        assert self.last_unit is not None
        return self.net_call.finish(step, self.last_unit, output)

    def reduce_gradients(self) -> None:
        for root in self.sharded_roots:
            sharding.reduce_gradients(root)

    def same_number(self, batch: Any) -> int:
        """Of micro-batches, on all data ranks: weights that are let go between them are gathered by all at once."""
        count = torch.tensor(len(sizes_of(batch, self.spec.micro_batches)), device=self.pipeline.link.device)
        if self.sharded_roots and self.spec.reshards:
            dist.all_reduce(count, dist.ReduceOp.MIN, group=self.data_group)
        return int(count)


def split(batch: Any, parts: int) -> tuple[list[Any], list[int]]:
    """A batch as at most `parts` micro-batches, and their sizes, which differ by at most one.

    Each has its tensors to itself, so that a step may change them in place.
    """
    sizes = sizes_of(batch, parts)
    return [tree_map(copied, part) for part in cut(batch, sizes)], sizes


def sizes_of(batch: Any, parts: int) -> list[int]:
    lengths = lengths_in(batch)
    if not lengths:
        raise ValueError("strategy.mesh.pipe: a batch without a tensor cannot be cut into micro-batches.")
    count = max(1, min(parts, lengths[0]))
    return [lengths[0] // count + (micro < lengths[0] % count) for micro in range(count)]


def lengths_in(tree: Any) -> list[int]:
    return [len(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]


def rows_in(arguments: Any, size: int) -> int:
    """Rows of what the net is called with for `size` samples: as many, unless its step has changed their number."""
    lengths = lengths_in(arguments)
    return size if size in lengths or not lengths else lengths[0]


def cut(tree: Any, sizes: list[int]) -> list[Any]:
    """Views of the same with the rows of each micro-batch; what has other than all rows goes to each as it is."""
    rows = rows_in(tree, sum(sizes))
    ends = [sum(sizes[:micro]) * rows // sum(sizes) for micro in range(len(sizes) + 1)] if sum(sizes) else [0, 0]

    def part(leaf: Any, micro: int) -> Any:
        if is_by_rows(leaf, rows) or (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows):
            return leaf[ends[micro] : ends[micro + 1]]
        return leaf

    def cut_out(micro: int) -> Any:
        return tree_map(lambda leaf: part(leaf, micro), tree, is_leaf=lambda node: is_by_rows(node, rows))

    return [cut_out(micro) for micro in range(len(sizes))]


def copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@cache
def train_order(spec: Grid, micro_batches: int) -> Order:
    order = order_of(spec.schedule, spec.pipe, spec.rank_stages, micro_batches)
    return with_transfers(order, spec.num_stages, lambda stage: rank_of(stage, spec.pipe, spec.kind))


@cache
def forward_order(spec: Grid, micro_batches: int) -> Order:
    order = forward_only(spec.pipe, spec.num_stages, micro_batches, spec.kind)
    return with_transfers(order, spec.num_stages, lambda stage: rank_of(stage, spec.pipe, spec.kind))


def joined_outputs(outputs: list[Any], rows: list[int], owner: str) -> Any:
    """The outputs of all micro-batches, whose nets were called with so many rows, as that of one batch."""
    return tree_map(lambda *same: joined(same, rows, owner), *outputs)


def joined(same: Sequence[Any], rows: list[int], owner: str) -> Any:
    """One output of all micro-batches: its rows together, the mean of a number, or what is the same for all."""
    one, most = same[0], rows.index(max(rows))
    if len(same) == 1:
        return one
    if not all(isinstance(part, Tensor) for part in same):
        is_same = not any(isinstance(part, Tensor) for part in same) and all(part == one for part in same)
    elif all(part.ndim and len(part) == count for part, count in zip(same, rows, strict=True)):
        return torch.cat(list(same))
    else:
        is_same = all(torch.equal(part, one) for part in same)
        per_row = len(same[most]) // rows[most] if one.ndim else 0
        if not is_same and per_row and all(len(p) == per_row * n for p, n in zip(same, rows, strict=True)):
            return torch.cat(list(same))
        if not is_same and not one.ndim and takes_gradient(one):
            return sum(part * (count / sum(rows)) for part, count in zip(same, rows, strict=True))
    if is_same:
        return one
    shown = tuple(one.shape) if isinstance(one, Tensor) else one
    raise ValueError(
        f"strategy.mesh.pipe: what {owner}'s net gives its last unit has a part of shape {shown} for a micro-batch of "
        f"{rows[0]} samples, which is another for each; validation cannot join it. Give it a row for each sample, or "
        f"choose strategy=fsdp."
    )


class ByRows:
    """Stands for a part of an output that has a row for each sample."""


def kept_if_odd(part: Any, rows: int) -> Any:
    if isinstance(part, Tensor):
        return ByRows() if part.ndim and len(part) == rows else part.detach().clone()
    return part
