"""Which modules a step calls and which parameters its loss reaches, where ranks must not differ in it.

DeepSpeed and FSDP2 gather the weights of whatever module a rank comes to, and communicate the gradients that it has,
packed together. Where the samples of two ranks take two branches of a net, the weights or gradients of one branch are
mixed with those of the other without a word if they are of one size; else the ranks wait for each other for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

END = ""  # stands for a module when a step has called all of its

WAY_OUT = (
    "would be mixed up. Have all samples go the same way (a branch times 0 will do), or choose strategy=ddp with "
    "strategy.find_unused_parameters=true."
)


class Reach:
    """Ends the run where ranks, or micro-batches, take other ways, before anything of it is communicated.

    Ranks tell each other in the first micro-batch, module by module. From then on each compares its own way with that.

    names: of the parameters that are looked at, the same on all ranks of `group`.
    """

    def __init__(
        self,
        names: Sequence[str],
        strategy: str,
        group: dist.ProcessGroup | None,
        device: torch.device,
        way_out: str = WAY_OUT,
    ) -> None:
        self.way_out = way_out
        self.names, self.strategy, self.group, self.device = list(names), strategy, group, device
        self.nodes: dict[str, Node] = {}
        self.unreached: frozenset[str] | None = None  # None until ranks have told each other
        self.nested: set[str] = set()  # of the unreached: those that a backward inside of the backward has reached
        self.known_nested: frozenset[str] | None = None
        self.listened: set[str] = set()
        self.frozen: set[str] = set()  # of the parameters: those without requires_grad, now
        self.frozen_before: set[str] = set()  # and in the micro-batch before
        self.untouched: frozenset[str] = frozenset()  # which the losses of an earlier run have never reached
        self.modules: list[str] = []
        self.order: list[str] | None = None  # of the modules that a step calls; None until the first has called them
        self.called: list[str] | None = None  # in the step under way; None outside of one

    # --- forward ----------------------------------------------------------------------------------------------------

    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """Look at the calls of these modules, of which weights are gathered; the same on all ranks of the group."""
        self.modules = list(modules)
        for fqn, module in modules.items():
            module.register_forward_pre_hook(lambda *_, fqn=fqn: self.call(fqn), prepend=True)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, a training step calls its modules; collective the first time."""
        self.called = []
        try:
            yield
            self.call(END)
            self.order = self.called
        finally:
            self.called = None

    def call(self, fqn: str) -> None:
        """ValueError if it is not the turn of this module."""
        if self.called is None or not self.modules:
            return  # a validation, or a backward that computes a block again
        if self.order is None:
            self.compare_calls(fqn)
        else:
            expected = self.order[len(self.called)]
            if fqn != expected:
                raise ValueError(
                    f"strategy={self.strategy}: rank {dist.get_rank()} {does(fqn)} where the first micro-batch "
                    f"{does(expected)}; what ranks gather together {self.way_out}"
                )
        self.called.append(fqn)

    def compare_calls(self, fqn: str) -> None:
        """Collective; ValueError on all ranks alike."""
        known = [*self.modules, END]
        own = torch.tensor([known.index(fqn)], device=self.device)
        places = torch.empty(dist.get_world_size(self.group), dtype=own.dtype, device=self.device)
        dist.all_gather_into_tensor(places, own, group=self.group)
        found = [known[place] for place in places.tolist()]
        other = next((rank for rank, name in enumerate(found) if name != found[0]), None)
        if other is not None:
            ranks = dist.get_process_group_ranks(self.group)
            raise ValueError(
                f"strategy={self.strategy}: rank {ranks[0]} {does(found[0])} while rank {ranks[other]} "
                f"{does(found[other])}; what ranks gather together {self.way_out}"
            )

    # --- backward ---------------------------------------------------------------------------------------------------

    def watch(self, loss: Tensor, leaves: Callable[[], Mapping[str, Tensor]]) -> None:
        """Look as the backward of `loss` begins. `leaves()` gives what autograd adds gradients to, by name."""
        if loss.requires_grad:
            loss.register_hook(lambda _: self.begin(leaves()))

    def begin(self, leaves: Mapping[str, Tensor]) -> None:
        self.check(self.missed(leaves))
        self.frozen_before = self.frozen
        self.listen()

    def missed(self, leaves: Mapping[str, Tensor]) -> Iterable[str]:
        """Names of what the backward under way will not come to."""
        for fqn in leaves.keys() - self.nodes.keys():
            if leaves[fqn].requires_grad:
                self.nodes[fqn] = get_gradient_edge(leaves[fqn]).node
        self.frozen = {fqn for fqn, leaf in leaves.items() if not leaf.requires_grad}
        runs = torch._C._will_engine_execute_node  # torch.autograd.graph.register_multi_grad_hook asks it, too
        return (fqn for fqn in self.names if fqn not in self.nodes or not runs(self.nodes[fqn]))

    def check(self, missed: Iterable[str]) -> None:
        """ValueError if not all ranks miss these parameters, as they did in the first micro-batch."""
        unreached = frozenset(missed)
        if self.unreached is None:
            self.compare(unreached)
            self.unreached = unreached
            if late := sorted(self.untouched - unreached):
                raise ValueError(
                    f"strategy={self.strategy}: no loss before the checkpoint has reached parameter {late[0]}, and "
                    f"DeepSpeed would step it as one that has been stepped since the start; resume under strategy=ddp."
                )
        elif changed := sorted((unreached ^ self.unreached) & (self.frozen | self.frozen_before)):
            raise ValueError(
                f"strategy={self.strategy}: requires_grad of parameter {changed[0]} is not what it was in the first "
                f"micro-batch; what is trained has to be said before the run, or choose strategy=ddp with "
                f"strategy.find_unused_parameters=true."
            )
        elif differing := sorted(unreached ^ self.unreached):
            fqn = differing[0]
            now, before = ("does not reach", "did") if fqn in unreached else ("reaches", "did not")
            raise ValueError(
                f"strategy={self.strategy}: the loss of rank {dist.get_rank()} {now} parameter {fqn}, as it {before} "
                f"in the first micro-batch; gradients that ranks reduce together {self.way_out}"
            )

    def listen(self) -> None:
        """Hear of gradients that a backward inside of this one makes, as a reentrant checkpoint's does."""
        for fqn in (self.unreached or frozenset()) & self.nodes.keys() - self.listened:
            self.nodes[fqn].register_hook(lambda *_, fqn=fqn: self.nested.add(fqn))
            self.listened.add(fqn)

    def finish(self) -> None:
        """Behind a backward: ValueError where ranks, or micro-batches, differ in what was reached inside of it."""
        if not self.unreached:
            return
        nested = frozenset(self.nested)
        self.nested.clear()
        if self.known_nested is None:
            self.compare(self.unreached - nested)
            self.known_nested = nested
        elif differing := sorted(nested ^ self.known_nested):
            raise ValueError(
                f"strategy={self.strategy}: a backward inside of the loss's backward (a reentrant checkpoint's) does "
                f"not reach parameter {differing[0]} in every micro-batch; gradients that ranks reduce together "
                f"{self.way_out}"
            )

    @property
    def unused(self) -> frozenset[str]:
        """What nothing has reached so far."""
        return (self.unreached or frozenset()) - (self.known_nested or frozenset())

    def compare(self, unreached: frozenset[str]) -> None:
        """Collective; ValueError on all ranks alike."""
        counts = torch.tensor([fqn not in unreached for fqn in self.names], dtype=torch.int32, device=self.device)
        dist.all_reduce(counts, group=self.group)
        ranks = dist.get_world_size(self.group)
        for fqn, count in zip(self.names, counts.tolist(), strict=True):
            if count not in (0, ranks):
                raise ValueError(
                    f"strategy={self.strategy}: the losses of {count} of {ranks} ranks reach parameter {fqn}; "
                    f"gradients that ranks reduce together {self.way_out}"
                )


def does(fqn: str) -> str:
    return f"calls {fqn}" if fqn else "is through its forward"
