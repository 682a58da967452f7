"""A step that only the last pipeline stage can run, as if it had run on every rank: its net call, loss and logs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric


class Called(BaseException):
    """Carries the net's arguments out of a step; no step's own `except Exception` catches it."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments


class NetCall:
    """Stands in for a net whose parts lie on several ranks: its first rank learns what the step calls it with, the last
    one what the step makes of its output."""

    def __init__(self, net: nn.Module, owner: str) -> None:
        self.owner = owner
        self.answer: Callable[..., Any] = self.refuse
        self.ends: set[Any] | None = None  # where the net's last output hangs in autograd's graph, if that can be seen
        net.forward = self.call

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"strategy.mesh.pipe: {self.owner} calls its net outside of a step, or a second time within one; under a "
            f"pipeline a step calls it once. Change that, or choose strategy=fsdp."
        )

    @contextmanager
    def answering(self, answer: Callable[..., Any]) -> Iterator[None]:
        self.answer = answer
        try:
            yield
        finally:
            self.answer = self.refuse

    def arguments(self, step: Callable[[], Any], first_unit: nn.Module) -> tuple[Any, ...]:
        """What `step` calls its net with; it is left there. Keyword arguments are for the last unit alone."""

        def carry_out(*args: Any, **kwargs: Any) -> Any:
            if kwargs and not takes(first_unit, args, kwargs):
                raise ValueError(
                    f"strategy.mesh.pipe: {self.owner} calls its net with {', '.join(kwargs)} by keyword, which under "
                    f"a pipeline goes to the net's last unit alone; pass what {type(first_unit).__name__}, its first "
                    f"unit, takes by position, or choose strategy=fsdp."
                )
            raise Called(args)

        try:
            with self.answering(carry_out):
                step()
        except Called as call:
            return call.arguments
        raise ValueError(f"strategy.mesh.pipe: a step of {self.owner} does not call its net; choose strategy=fsdp.")

    def finish(self, step: Callable[[], Any], last_unit: nn.Module, output: Any) -> Any:
        """What `step` returns if its net's last unit is given `output` (and the call's keyword arguments)."""
        calls = 0
        self.ends = None

        def answer(*_: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                self.refuse()
            given = last_unit(output, **kwargs)
            leaves = [leaf for leaf in tree_leaves(given) if leaf is not None]
            if all(isinstance(leaf, Tensor) for leaf in leaves):
                self.ends = {leaf.grad_fn for leaf in leaves}
            return given

        with self.answering(answer):
            result = step()
        if calls == 0:
            raise ValueError(f"strategy.mesh.pipe: a step of {self.owner} does not call its net; choose strategy=fsdp.")
        return result

    def check_loss(self, loss: Tensor) -> None:
        """ValueError if the loss that `finish` gave reaches parameters past the net's output: here are only some."""
        if self.ends is None:
            return
        todo, seen = [loss.grad_fn], set(self.ends)
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(getattr(node, "variable", None), nn.Parameter):  # only autograd's leaves have it
                raise ValueError(
                    f"strategy.mesh.pipe: the loss of {self.owner}.training_step depends on parameters otherwise than "
                    f"through the net's output, as a penalty on weights does; under a pipeline it would cover the last "
                    f"stage's alone. Use the optimizer's weight_decay, or choose strategy=ddp."
                )
            todo += [following for following, _ in node.next_functions]


def takes(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `args` are enough for `unit`, and none of `kwargs` is meant for it."""
    signature = inspect.signature(unit.forward)
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return not kwargs.keys() & signature.parameters.keys()


@dataclass
class Entry:
    """One `self.log` of a step."""

    name: str
    value: float
    batch_size: int | None
    options: tuple[tuple[str, Any], ...]
    metric: str | None  # FQN of a metric object that was logged; its value is then that of this step alone

    @property
    def kind(self) -> tuple[Any, ...]:
        """What does not change from step to step."""
        return self.name, self.options, self.metric, self.batch_size is None


class LogRelay:
    """Lets every pipe rank log what the last stage's rank has logged: one small tensor per step.

    The names go along, as an object, only when they are new. A metric object, logged or not, is updated by the source
    alone: outside of a step, what it computes there is what it computes on every rank.

    in_stages: modules that other ranks do not have.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        group: dist.ProcessGroup,
        source: int,
        device: torch.device,
        in_stages: Iterable[nn.Module],
    ) -> None:
        self.module, self.group, self.source, self.device = module, group, source, device
        self.is_source = dist.get_rank() == source
        self.kinds: list[list[tuple[Any, ...]]] = []
        self.log = module.log
        elsewhere = set(in_stages)
        self.metrics = [part for part in module.modules() if isinstance(part, Metric) and part not in elsewhere]
        self.words = 16 + len(self.metrics)
        self.is_local = False  # in a step, and within another metric's compute: only the source is there
        for metric in self.metrics:
            self.share(metric)

    @contextmanager
    def recording(self) -> Iterator[list[Entry]]:
        """Collect what the module logs instead of logging it."""
        entries: list[Entry] = []

        def record(name: str, value: Any, *args: Any, batch_size: int | None = None, **options: Any) -> None:
            options |= dict(zip(POSITIONAL, args, strict=False))
            batch_size = options.pop("batch_size", batch_size)
            metric = None
            if isinstance(value, Metric):
                metric = next(fqn for fqn, part in self.module.named_modules() if part is value)
                value = value._forward_cache if value._forward_cache is not None else 0.0
            value = value.detach() if isinstance(value, Tensor) else value
            entries.append(Entry(name, float(value), batch_size, tuple(sorted(options.items())), metric))

        self.module.log = record  # type: ignore[method-assign]
        try:
            with self.locally():
                yield entries
        finally:
            self.module.log = self.log  # type: ignore[method-assign]

    @contextmanager
    def locally(self) -> Iterator[None]:
        before, self.is_local = self.is_local, True
        try:
            yield
        finally:
            self.is_local = before

    def replay(self, entries: Sequence[Entry], *, loss: float = 0.0) -> float:
        """Log the source's entries on every rank of the group, and return the source's `loss`."""
        kinds = [entry.kind for entry in entries]
        updates = [float(metric._update_count) for metric in self.metrics]
        sizes = [float(entry.batch_size or 0) for entry in entries]
        number = self.kinds.index(kinds) if kinds in self.kinds else len(self.kinds)
        words = [float(number), loss, *updates, *(entry.value for entry in entries), *sizes]
        message = self.broadcast(words)
        if int(message[0]) == len(self.kinds):
            box = [kinds]
            dist.broadcast_object_list(box, src=self.source, group=self.group)
            self.kinds.append(box[0])
            self.words = max(self.words, 2 + len(updates) + 2 * len(box[0]))
            message = self.broadcast(words)
        known = self.kinds[int(message[0])]
        for metric, count in zip(self.metrics, message[2:], strict=False):
            metric._update_count = int(count)
        logged = message[2 + len(updates) :]
        for position, (name, options, fqn, unsized) in enumerate(known):
            value: Any = torch.tensor(logged[position], device=self.device)
            size = None if unsized else int(logged[len(known) + position])
            self.log(name, value if fqn is None else self.of_step(fqn, value), batch_size=size, **dict(options))
        return message[1]

    def broadcast(self, words: list[float]) -> list[float]:
        """The source's words, as many as there is room for."""
        padded = (words + [0.0] * self.words)[: self.words]
        message = torch.tensor(padded, dtype=torch.float64, device=self.device)
        dist.broadcast(message, self.source, group=self.group)
        return message.tolist()

    def shared(self, tree: Any) -> Any:
        """The source's `tree`, on every rank of the group."""
        box = [tree_map(lambda part: moved(part, "cpu"), tree) if self.is_source else None]
        dist.broadcast_object_list(box, src=self.source, group=self.group)
        return tree if self.is_source else tree_map(lambda part: moved(part, self.device), box[0])

    def of_step(self, fqn: str, value: Tensor) -> Metric:
        """The metric object called `fqn`, whose value for the step was `value`."""
        metric = self.module.get_submodule(fqn)
        assert isinstance(metric, Metric)
        if not self.is_source:
            metric._forward_cache = cast(Any, value)
        return metric

    def share(self, metric: Metric) -> None:
        """Let what `metric` computes be what the source's computes."""
        compute = metric.compute

        def compute_at_source(*args: Any, **kwargs: Any) -> Any:
            # torchmetrics' forward computes, too, of what it is called with
            if self.is_local or not metric._should_unsync:
                return compute(*args, **kwargs)
            box: list[Any] = [None]
            if self.is_source:
                with self.locally():
                    # not with the number of the source's GPU on it
                    box = [tree_map(lambda part: moved(part, "cpu"), compute(*args, **kwargs))]
            dist.broadcast_object_list(box, src=self.source, group=self.group)
            return tree_map(lambda part: moved(part, self.device), box[0])

        metric.compute = compute_at_source  # type: ignore[method-assign]


def moved(part: Any, device: torch.device | str) -> Any:
    return part.to(device) if isinstance(part, Tensor) else part


POSITIONAL = tuple(inspect.signature(pl.LightningModule.log).parameters)[3:]  # after self, name and value


def merge(per_micro: Sequence[Sequence[Entry]], weights: Sequence[float], owner: str) -> list[Entry]:
    """What a step logged for each micro-batch as one: by its `reduce_fx`; means by the micro-batches' sizes."""
    kinds = [[entry.kind for entry in entries] for entries in per_micro]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"strategy.mesh.pipe: {owner}.training_step logs other things for one micro-batch than for another; log "
            f"the same for each, or choose strategy=fsdp."
        )
    merged = []
    for same in zip(*per_micro, strict=True):
        value = reduced([entry.value for entry in same], weights, dict(same[0].options).get("reduce_fx", "mean"))
        sizes = [entry.batch_size for entry in same]
        size = None if sizes[0] is None else sum(size or 0 for size in sizes)
        merged.append(Entry(same[0].name, value, size, same[0].options, same[0].metric))
    return merged


def reduced(values: Sequence[float], weights: Sequence[float], reduce_fx: Any) -> float:
    """`reduce_fx` is any that `self.log` takes: a word, or a function of that name."""
    name = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx.__name__
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if name == "sum":
        return sum(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True))
