"""A step that only the last pipeline stage can run, as if it had run on every rank: its net call, loss and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
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

    def arguments(self, step: Callable[[], Any]) -> tuple[Any, ...]:
        """What `step` calls its net with; it is left there."""

        def carry_out(*args: Any, **_: Any) -> Any:
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

        def answer(*_: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return last_unit(output, **kwargs) if calls == 1 else self.refuse()

        with self.answering(answer):
            result = step()
        if calls == 0:
            raise ValueError(f"strategy.mesh.pipe: a step of {self.owner} does not call its net; choose strategy=fsdp.")
        return result


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

    The names go along, as an object, only when they are new.
    """

    def __init__(self, module: pl.LightningModule, group: dist.ProcessGroup, source: int, device: torch.device) -> None:
        self.module, self.group, self.source, self.device = module, group, source, device
        self.is_source = dist.get_rank() == source
        self.kinds: list[list[tuple[Any, ...]]] = []
        self.words = 16
        self.log = module.log
        self.shared: set[str] = set()

    @contextmanager
    def recording(self) -> Iterator[list[Entry]]:
        """Collect what the module logs instead of logging it."""
        entries: list[Entry] = []

        def record(name: str, value: Any, *args: Any, batch_size: int | None = None, **options: Any) -> None:
            options |= dict(zip(POSITIONAL, args, strict=False))
            metric = None
            if isinstance(value, Metric):
                metric = next(fqn for fqn, part in self.module.named_modules() if part is value)
                value = value._forward_cache if value._forward_cache is not None else 0.0
            value = value.detach() if isinstance(value, Tensor) else value
            entries.append(Entry(name, float(value), batch_size, tuple(sorted(options.items())), metric))

        self.module.log = record  # type: ignore[method-assign]
        try:
            yield entries
        finally:
            self.module.log = self.log  # type: ignore[method-assign]

    def replay(self, entries: Sequence[Entry], *, loss: float = 0.0) -> float:
        """Log the source's entries on every rank of the group, and return the source's `loss`."""
        kinds = [entry.kind for entry in entries]
        values = [loss, *(entry.value for entry in entries), *(float(entry.batch_size or 0) for entry in entries)]
        number = self.kinds.index(kinds) if kinds in self.kinds else len(self.kinds)
        message = self.broadcast([float(number), *values])
        if int(message[0]) == len(self.kinds):
            box = [kinds]
            dist.broadcast_object_list(box, src=self.source, group=self.group)
            self.kinds.append(box[0])
            self.words = max(self.words, 2 + 2 * len(box[0]))
            message = self.broadcast([float(number), *values])
        known = self.kinds[int(message[0])]
        for position, (name, options, metric, unsized) in enumerate(known):
            value: Any = torch.tensor(message[2 + position], device=self.device)
            size = None if unsized else int(message[2 + len(known) + position])
            if metric is not None:
                value = self.share(metric, value)
            self.log(name, value, batch_size=size, **dict(options))
        return message[1]

    def broadcast(self, words: list[float]) -> list[float]:
        """The source's words, as many as there is room for."""
        padded = (words + [0.0] * self.words)[: self.words]
        message = torch.tensor(padded, dtype=torch.float64, device=self.device)
        dist.broadcast(message, self.source, group=self.group)
        return message.tolist()

    def share(self, fqn: str, step_value: Tensor) -> Metric:
        """The metric object called `fqn`; what it computes is, from the first time on, what the source's computes."""
        metric = self.module.get_submodule(fqn)
        assert isinstance(metric, Metric)
        if fqn not in self.shared:
            self.shared.add(fqn)
            compute = metric.compute

            def compute_at_source() -> Any:
                if not metric._to_sync:
                    return compute()  # of one step: what Metric.forward asks for, on the source alone
                box = [compute() if self.is_source else None]
                dist.broadcast_object_list(box, src=self.source, group=self.group)
                return box[0]

            metric.compute = compute_at_source  # type: ignore[method-assign]
        if not self.is_source:
            metric._forward_cache = cast(Any, step_value)
            metric._update_count += 1
        return metric


POSITIONAL = ("prog_bar", "logger", "on_step", "on_epoch")  # of LightningModule.log, after name and value


def merge(per_micro: Sequence[Sequence[Entry]], weights: Sequence[float], owner: str) -> list[Entry]:
    """What a step logged for each micro-batch as one: means, weighted by the micro-batches' sizes."""
    kinds = [[entry.kind for entry in entries] for entries in per_micro]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"strategy.mesh.pipe: {owner}.training_step logs other things for one micro-batch than for another; log "
            f"the same for each, or choose strategy=fsdp."
        )
    merged = []
    for same in zip(*per_micro, strict=True):
        value = sum(entry.value * weight for entry, weight in zip(same, weights, strict=True))
        sizes = [entry.batch_size for entry in same]
        size = None if sizes[0] is None else sum(size or 0 for size in sizes)
        merged.append(Entry(same[0].name, value, size, same[0].options, same[0].metric))
    return merged
