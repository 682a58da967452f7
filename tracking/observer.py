"""Observer: reads back from the live objects what a run trains with, and tells where that is not the config's."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from models.steps import steps_done
from strategies.engines.checkpoint import Holds
from strategies.engines.precision import name
from tracking.contradictions import Expected, contradictions
from tracking.found import Found, Group, RankFound, Stepping, Tensors, found_path, merged, took

PLAIN = (bool, int, float, str, type(None))


class Shows(Holds, Protocol):
    """What of an engine is looked at."""

    optimizers: list[Optimizer]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]: ...


@final
class Observer(pl.Callback):
    """Rank 0 finds in `found` what all ranks have seen, when training is over.

    Parameters are those of the start, settings of optimizers those of the first step, what optimizers keep that of the
    end. Put it before what may end a step's batch in another way, and behind what changes the model at the start.

    asked: whether the module has made its optimizer by the config's; None if it was given none.
    """

    def __init__(self, run_dir: Path, expected: Expected, asked: Callable[[], bool | None]) -> None:
        self.run_dir, self.expected, self.asked = run_dir, expected, asked
        self.found: Found | None = None
        self.groups: dict[Tensor, tuple[int, int]] = {}  # of which optimizer, and of its groups, a parameter is
        self.told: list[str] = []
        self.micro = Counter[int]()  # micro-batches by their samples
        self.steps: list[tuple[int, int]] = []
        self.shapes: list[list[int]] = []
        self.of_step = 0  # samples of the step under way
        self.settings: list[list[Group]] | None = None  # before the first step
        self.gradients: set[str] = set()

    # --- the start --------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See which parameters the module gives its optimizers: engines will have put others in their place."""
        configure = pl_module.configure_optimizers

        @wraps(configure)
        def seen() -> Any:
            vars(pl_module).pop("configure_optimizers", None)  # an engine may have called it off already
            configured = configure()
            for number, optimizer in enumerate(optimizers_in(configured)):
                for place, group in enumerate(optimizer.param_groups):
                    self.groups |= dict.fromkeys(group["params"], (number, place))
            return configured

        pl_module.configure_optimizers = seen  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine, self.module = cast(Shows, trainer.strategy), pl_module
        self.done = steps_done(trainer)
        live = dict(pl_module.named_parameters())
        self.parameters = {
            held.name: Tensors(
                elements=torch.Size(held.shape).numel(),
                trainable=parameter.requires_grad,
                format=name(parameter.dtype),
                stepped=name(held.stepped.dtype),
                group=self.groups.get(parameter),
            )
            for held in self.engine.held()
            if (parameter := live.get(held.name)) is not None
        }
        self.buffers = {fqn: buffer.numel() for fqn, buffer in pl_module.named_buffers()}
        self.tell(trainer)

    def tell(self, trainer: pl.Trainer) -> None:
        """Say on the first rank what contradicts the config, as far as it is known there, and each thing once."""
        if not trainer.is_global_zero:
            return
        # Of the others' samples nothing is known before the end: they are taken to be as many.
        data_ranks = self.engine.distributed_sampler_kwargs["num_replicas"]
        steps = [(samples * data_ranks, count) for samples, count in self.steps]
        known = self.mine().model_copy(update={"steps": steps})
        for line in self.contradictions(merged([known], asked=self.asked(), notes=[])):
            if line not in self.told:
                self.told.append(line)
                sys.stderr.write(f"{line}\n")

    def contradictions(self, found: Found) -> list[str]:
        return contradictions(found, self.expected, type(self.module).__name__)

    # --- steps ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        shapes = [list(tensor.shape) for tensor in tensors_in(batch) if tensor.ndim > 0]
        if shapes and all(one[0] == other[0] for one, other in pairwise(shapes)):
            self.of_step += shapes[0][0]
            self.micro[shapes[0][0]] += 1
            self.shapes = self.shapes or [shape[1:] for shape in shapes]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.settings is None:
            self.settings = [list(map(group_of, one.param_groups)) for one in self.optimizers]
            for parameter in pl_module.parameters():
                if parameter.requires_grad:  # of a gradient that an engine has taken away already, it is the same
                    gradient = parameter.grad
                    self.gradients.add(name(parameter.dtype if gradient is None else gradient.dtype))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if steps_done(trainer) == self.done:
            return
        is_first = not self.steps
        self.done = steps_done(trainer)
        if self.of_step:
            took(self.steps, self.of_step)
        self.of_step = 0
        if is_first:
            self.tell(trainer)

    # --- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = found_path(self.run_dir, trainer.global_rank)
        with telling_why_not():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.mine().model_dump_json())
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            with telling_why_not():
                ranks = RankFound.load_all(self.run_dir, trainer.world_size)
                found = merged(ranks, asked=self.asked(), notes=[])
                lines = dict.fromkeys([*self.told, *self.contradictions(found)])
                self.found = found.model_copy(update={"notes": list(lines)})
        trainer.strategy.barrier()
        path.unlink(missing_ok=True)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that step; of one inside of an engine's, the inner one."""
        return [self.engine.stepping, *self.engine.optimizers[1:]]

    def mine(self) -> RankFound:
        optimizers = self.optimizers
        settings = self.settings or [list(map(group_of, one.param_groups)) for one in optimizers]
        return RankFound(
            data_rank=self.engine.distributed_sampler_kwargs["rank"],
            parameters=self.parameters,
            buffers=self.buffers,
            optimizers=[stepping_of(one, groups) for one, groups in zip(optimizers, settings, strict=True)],
            gradients=sorted(self.gradients),
            micro=dict(self.micro),
            steps=self.steps,
            shapes=self.shapes,
        )


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in whatever `configure_optimizers` may return, in their order."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for part in configured:
            yield from optimizers_in(part)


def stepping_of(optimizer: Optimizer, groups: list[Group]) -> Stepping:
    kept = [value for state in optimizer.state.values() for value in vars_of(state) if isinstance(value, Tensor)]
    return Stepping(
        name=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        made_with=settings_of(optimizer.defaults),
        groups=groups,
        state=sorted({name(value.dtype) for value in kept if value.ndim > 0}),
    )


def vars_of(state: Any) -> list[Any]:
    return list(state.values()) if isinstance(state, Mapping) else []


def group_of(group: Mapping[str, Any]) -> Group:
    return Group(parameters=0, settings=settings_of(group))


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a record can say of a param group: its numbers and words."""
    plain = {key: plain_of(value) for key, value in group.items() if key not in ("params", "param_names")}
    return {key: value for key, value in plain.items() if value is not NotImplemented}


def plain_of(value: Any) -> Any:
    """A value as JSON has it; NotImplemented of what it has not."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, list | tuple):
        parts = [plain_of(part) for part in value]
        return NotImplemented if any(part is NotImplemented for part in parts) else parts
    return value if isinstance(value, PLAIN) else NotImplemented


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch of any common kind, in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from tensors_in(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors_in(getattr(batch, field.name))


@contextmanager
def telling_why_not() -> Iterator[None]:
    """A run does not fail by what is noted of it: it is about to save what it has trained."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.stderr.write(f"what the run trained with cannot be kept in its record: {error}\n")
