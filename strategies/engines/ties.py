"""Parameters that stand in two places of a net, where those places may come to lie in different pipeline stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.plan import ParallelPlan
from strategies.engines.materialize import put
from strategies.engines.tensor import SPLIT_DIM


@dataclass(frozen=True)
class Tie:
    """One parameter; `places` has its FQNs by stage, the owner's first."""

    places: Mapping[int, list[str]]

    @property
    def owner(self) -> str:
        return next(iter(self.places.values()))[0]

    @property
    def copies(self) -> dict[int, str]:
        """For each stage the place that holds its copy."""
        return {stage: fqns[0] for stage, fqns in self.places.items()}


def find_ties(module: nn.Module, plan: ParallelPlan, stage_of: Mapping[str, int]) -> list[Tie]:
    """The shared parameters of a whole `module`; `stage_of` has the stage of each unit by its FQN in the module.

    ValueError if tensor parallelism would split one parameter in two ways.
    """
    places: dict[nn.Parameter, list[str]] = defaultdict(list)
    for fqn, parameter in module.named_parameters(remove_duplicate=False):
        places[parameter].append(fqn)
    ties = []
    for fqns in places.values():
        if len(fqns) > 1:
            check_splits(fqns, plan)
            by_stage: dict[int, list[str]] = defaultdict(list)
            for fqn in fqns:
                unit = next((unit for unit in stage_of if fqn.startswith(f"{unit}.")), None)
                by_stage[stage_of[unit] if unit else 0].append(fqn)
            ties.append(Tie(dict(by_stage)))
    return ties


def check_splits(fqns: list[str], plan: ParallelPlan) -> None:
    styles = {fqn: plan.style(fqn.removeprefix(f"{plan.net}.").rpartition(".")[0]) for fqn in fqns}
    dims = {SPLIT_DIM.get(style) if style else None for style in styles.values()}
    if len(dims) > 1 and plan.tensor:
        listed = ", ".join(f"{fqn} ({style or 'whole'})" for fqn, style in styles.items())
        raise ValueError(
            f"plan.tensor: one parameter stands in {listed} and would be split in two ways; give its places styles "
            f"that split the same dim (embedding and vocabulary do)."
        )


class Ties:
    """The copies of shared parameters that this rank holds, and their sisters on other pipe ranks."""

    def __init__(
        self,
        module: nn.Module,
        ties: list[Tie],
        mine: set[int],
        group: dist.ProcessGroup,
        rank_of: Callable[[int], int],
    ) -> None:
        self.module, self.group, self.rank_of = module, group, rank_of
        self.ties = ties
        self.mine = mine
        for tie in ties:
            self.settle(tie)
        self.across = [tie for tie in ties if len(tie.places) > 1]
        self.owner_of = {fqn: tie.owner for tie in ties for fqn in tie.copies.values()}

    def settle(self, tie: Tie) -> None:
        """One object in all places of a stage, another one in each further stage that is on this rank."""
        held: list[nn.Parameter] = []
        for stage, fqns in tie.places.items():
            if stage not in self.mine:
                continue
            copy = self.module.get_parameter(fqns[0])
            if any(copy is other for other in held):
                copy = nn.Parameter(copy.detach().clone(), copy.requires_grad)
            held.append(copy)
            for fqn in fqns:
                parent, _, last = fqn.rpartition(".")
                put(self.module.get_submodule(parent), last, copy)

    @property
    def duplicates(self) -> set[nn.Parameter]:
        """Copies on this rank that are not their owner's: what is counted over all stages counts without them."""
        return {
            self.module.get_parameter(fqn)
            for tie in self.across
            for stage, fqn in list(tie.copies.items())[1:]
            if stage in self.mine
        }

    def sum_gradients(self) -> None:
        """Each copy's gradient becomes the sum of all copies', added up in the same order on every rank."""
        for tie in self.across:
            if self.mine & tie.copies.keys():
                self.sum_over(tie)

    def sum_over(self, tie: Tie) -> None:
        own = {
            stage: gradient(self.module.get_parameter(fqn)) for stage, fqn in tie.copies.items() if stage in self.mine
        }
        like = next(iter(own.values()))
        others = {stage: torch.empty_like(like) for stage in tie.copies if stage not in self.mine}
        works = []
        for stage, buffer in others.items():
            works.append(dist.irecv(buffer, self.peer(stage), group=self.group, tag=stage))
        for stage, part in own.items():
            for rank in {self.peer(other) for other in others}:
                works.append(dist.isend(part.contiguous(), rank, group=self.group, tag=stage))
        for work in works:
            cast(dist.Work, work).wait()
        parts = own | others
        total = sum((parts[stage] for stage in list(tie.copies)[1:]), parts[next(iter(tie.copies))].clone())
        for part in own.values():
            part.copy_(total)

    def peer(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.rank_of(stage))


def gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient; zeros are put where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
