"""Parameters that stand in two places of a net, where those places may come to lie in different pipeline stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from models.plan import ParallelPlan
from strategies.engines.materialize import put
from strategies.engines.shards import gradient
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


def find_ties(
    module: nn.Module,
    plan: ParallelPlan,
    stage_of: Mapping[str, int],
    rank_of: Callable[[int], int],
    *,
    tensor_ranks: int,
) -> list[Tie]:
    """The shared parameters of a whole `module`; `stage_of` has the stage of each unit by its FQN in the module.

    ValueError if tensor parallelism would split one parameter in two ways, or if two stages of one rank share a module.
    """
    places: dict[nn.Parameter, list[str]] = defaultdict(list)
    for fqn, parameter in module.named_parameters(remove_duplicate=False):
        places[parameter].append(fqn)
    ties = []
    for fqns in places.values():
        if len(fqns) > 1:
            if tensor_ranks > 1:
                check_splits(fqns, plan)
            by_stage: dict[int, list[str]] = defaultdict(list)
            for fqn in fqns:
                unit = next((unit for unit in stage_of if fqn.startswith(f"{unit}.")), None)
                by_stage[stage_of[unit] if unit else 0].append(fqn)
            check_modules(module, by_stage, rank_of)
            ties.append(Tie(dict(by_stage)))
    return ties


def check_modules(module: nn.Module, places: Mapping[int, list[str]], rank_of: Callable[[int], int]) -> None:
    """ValueError if a rank would need a copy of a parameter for each of two stages, and has one module to hold them."""
    seen: dict[tuple[int, nn.Module], tuple[int, str]] = {}
    for stage, fqns in places.items():
        for fqn in fqns:
            holder = fqn.rpartition(".")[0]
            part = module.get_submodule(holder)
            first_stage, first = seen.setdefault((rank_of(stage), part), (stage, holder))
            if first_stage != stage:
                raise ValueError(
                    f"strategy.mesh.pipe: {holder} is the same {type(part).__name__} object as {first}, and both come "
                    f"to lie on pipe rank {rank_of(stage)}, in two stages; give each place a module of its own that "
                    f"shares the parameters, or choose strategy.schedule=1f1b, or strategy=fsdp."
                )


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
        """Each copy's gradient becomes the sum of all copies', added up in the same order on every rank.

        Where no copy has one, as where the parameter is frozen, there is none: an optimizer would decay the weight by a
        gradient of zeros.
        """
        for tie, has_gradient in zip(self.across, self.have_gradients(), strict=True):
            if has_gradient and self.mine & tie.copies.keys():
                self.sum_over(tie)

    def have_gradients(self) -> list[bool]:
        """Of each parameter that stands in several stages, whether a copy has a gradient; collective over the pipe."""
        if not self.across:
            return []
        own = [
            [self.module.get_parameter(fqn) for stage, fqn in tie.copies.items() if stage in self.mine]
            for tie in self.across
        ]
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        flags = [float(any(copy.grad is not None for copy in copies)) for copies in own]
        found = torch.tensor(flags, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in found.tolist()]

    def sum_over(self, tie: Tie) -> None:
        own = {
            stage: gradient(self.module.get_parameter(fqn)) for stage, fqn in tie.copies.items() if stage in self.mine
        }
        like = next(iter(own.values()))
        others = {stage: torch.empty_like(like) for stage in tie.copies if stage not in self.mine}
        # As one batch: NCCL does what two ranks ask of each other in order, and two that both receive first would wait
        # for ever. It knows no tags: between two ranks, both sides go by the order of the stages.
        batch = []
        for stage in tie.copies:
            if stage in own:
                sent = own[stage].contiguous()
                ranks = sorted({self.peer(other) for other in others})
                batch += [dist.P2POp(dist.isend, sent, rank, group=self.group) for rank in ranks]
            else:
                batch.append(dist.P2POp(dist.irecv, others[stage], self.peer(stage), group=self.group))
        for work in dist.batch_isend_irecv(batch) if batch else []:
            work.wait()
        parts = own | others
        total = sum((parts[stage] for stage in list(tie.copies)[1:]), parts[next(iter(tie.copies))].clone())
        for part in own.values():
            part.copy_(total)

    def peer(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.rank_of(stage))
