"""What of a model lies on which rank of a grid: stages, what is sharded together, where the sequence is split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from strategies.cutting import cut
from strategies.schedules import rank_of

if TYPE_CHECKING:
    from models.stats import ModelStats, Part
    from strategies.grid import Grid


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered and reduced together; `shapes` are those that a tensor rank has."""

    shapes: tuple[tuple[int, ...], ...]
    ranks: int  # that shard them along their first dim, padded to a multiple

    @property
    def whole(self) -> int:
        """Elements without padding."""
        return sum(map(math.prod, self.shapes))

    @property
    def shard(self) -> int:
        """Elements of one rank, padding included."""
        if self.ranks == 1:
            return self.whole
        return sum(math.ceil(first / self.ranks) * math.prod(rest) for first, *rest in self.shapes)

    @property
    def padded(self) -> int:
        """Elements of all ranks."""
        return self.shard * self.ranks


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its units, and its parameters as they are sharded."""

    units: tuple[str, ...]
    groups: tuple[Group, ...]  # in forward order
    root: Group  # stays gathered from forward to backward
    is_last: bool

    @property
    def all_groups(self) -> tuple[Group, ...]:
        return (self.root, *self.groups)


@dataclass(frozen=True)
class Tie:
    """A parameter that stands in several stages, seen from one pipe rank."""

    elements: int  # of the shard of one copy
    here: tuple[int, ...]  # stages of this rank that have a copy
    elsewhere: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a grid puts the parts of a model."""

    grid: Grid
    stats: ModelStats

    @cached_property
    def stages(self) -> list[Stage]:
        units, sizes = self.stats.units, self.stats.sizes
        flops = [unit.forward_flops for unit in units.values()]
        numels = [sum(sizes[position] for position in unit.parameters) for unit in units.values()]
        names = [*units]
        return [self.stage([names[position] for position in part]) for part in cut(flops, numels, self.grid.num_stages)]

    def stages_of(self, pipe_rank: int) -> list[Stage]:
        return [stage for number, stage in enumerate(self.stages) if self.pipe_rank_of(number) == pipe_rank]

    def pipe_rank_of(self, stage: int) -> int:
        return rank_of(stage, self.grid.pipe, self.grid.kind)

    def stage(self, units: Sequence[str]) -> Stage:
        """`units` as engines/sharding.py shards them: what stands in two places belongs to the root."""
        chain, parts = self.stats.chain, self.parts(units)
        uses = Counter(position for part in parts for position in part.parameters)
        alone = [unit for unit in units if all(uses[position] == 1 for position in self.stats.units[unit].parameters)]
        stem, head = ([unit for unit in alone if unit in places] for places in (chain.stem, chain.head))
        together = [stem, *([unit] for unit in alone if unit in chain.blocks), head]
        root = self.group(unit for unit in units if unit not in alone)
        if self.grid.pipe == 1:
            between = tuple(self.stats.shapes[position] for position in self.stats.between)
            root = Group(root.shapes + between, self.grid.shards)
        groups = map(self.group, together)
        is_last = units[-1] == chain.modules[-1]
        return Stage(tuple(units), tuple(group for group in groups if group.shapes), root, is_last)

    def group(self, units: Iterable[str]) -> Group:
        shapes = {
            position: self.shape(position, part.style) for part in self.parts(units) for position in part.parameters
        }
        return Group(tuple(shapes.values()), self.grid.shards)

    def parts(self, units: Iterable[str]) -> list[Part]:
        return [part for unit in units for part in self.stats.units[unit].parts]

    def shape(self, position: int, style: str | None) -> tuple[int, ...]:
        """What a tensor rank has of a parameter."""
        shape = self.stats.shapes[position]
        match style:
            case "colwise" | "embedding" | "vocabulary":
                return (shape[0] // self.grid.tensor, *shape[1:])
            case "rowwise" if len(shape) > 1:
                return (shape[0], shape[1] // self.grid.tensor, *shape[2:])
        return shape

    @property
    def outside(self) -> Group:
        """Parameters of the module that do not belong to its net: nobody splits or shards them."""
        inside = {position for unit in self.stats.units.values() for position in unit.parameters}
        inside |= set(self.stats.between)
        return Group(tuple(shape for position, shape in enumerate(self.stats.shapes) if position not in inside), 1)

    @cached_property
    def sequence_units(self) -> tuple[str, ...]:
        """Units that take a part of the sequence, as engines/tensor.py decides it."""
        chain = self.stats.chain
        styles = {part.style for part in self.parts(chain.blocks) if part.parameters}
        wanted = self.grid.tensor > 1 and self.grid.sequence_parallel and self.stats.gap is None
        if not wanted or "sequence" not in styles or {None, "whole"} & styles:
            return ()
        return (*chain.blocks, *takewhile(self.is_norm, chain.head))

    def is_norm(self, unit: str) -> bool:
        """Whether a unit is itself a module of style `sequence`."""
        return any(part.name == unit and part.style == "sequence" for part in self.parts([unit]))

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """Blocks whose forward runs again in backward."""
        mode, blocks = self.grid.activation_checkpointing, self.stats.chain.blocks
        if mode == "none":
            return ()
        return blocks if mode == "full" else blocks[:: int(mode.removeprefix("every_"))]

    def parts_between(self, stage: Stage) -> int:
        """Into how many parts what a stage gives is split between the tensor ranks."""
        last = stage.units[-1]
        return self.grid.tensor if last in self.sequence_units and not self.is_norm(last) else 1

    def partial(self, stage: Stage) -> int:
        """Elements of parameters of whose gradients a tensor rank computes a part, from its part of the sequence."""
        parts = self.parts(unit for unit in stage.units if unit in self.sequence_units)
        return sum(
            self.stats.sizes[position] for part in parts if part.style == "sequence" for position in part.parameters
        )

    def loss_is_split(self, logits: Part) -> bool:
        """Whether the net takes its loss from logits that stay split, instead of giving them to its step."""
        last = self.stats.units[self.stats.chain.modules[-1]]
        return self.grid.loss_parallel and last.gives.elements < logits.gives.elements

    def ties(self, pipe_rank: int) -> list[Tie]:
        """Of parameters that stand in several stages, those of which this rank has a copy."""
        stages_of: dict[int, dict[int, int]] = {}
        for number, stage in enumerate(self.stages):
            for part in self.parts(stage.units):
                for position in part.parameters:
                    elements = Group((self.shape(position, part.style),), self.grid.shards).shard
                    stages_of.setdefault(position, {})[number] = elements
        ties = []
        for stages in stages_of.values():
            here = tuple(stage for stage in stages if self.pipe_rank_of(stage) == pipe_rank)
            elsewhere = tuple(stage for stage in stages if stage not in here)
            if len(stages) > 1 and here:
                ties.append(Tie(stages[here[0]], here, elsewhere))
        return ties
