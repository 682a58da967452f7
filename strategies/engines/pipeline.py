"""Runs a pipeline schedule on one rank: forwards, backwards and what passes between stages.

Torch's schedules say who does what when; carrying it out is done here, so that micro-batches may differ in size, no
forward is run only to learn shapes, and the loss is the user's own step. What is private in torch, tested on 2.13:
`pipelining.schedules.Schedule*` on stages that exist by name alone, for their `pipeline_order`, and
`pipelining._backward.stage_backward_input` and `stage_backward_weight`, for half a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from strategies import schedules
from strategies.engines.tensor import whole
from strategies.schedules import SCHEDULES, Name, Order, Step

Tensors = tuple[Tensor, ...]


@cache
def order_of(name: Name, ranks: int, stages_per_rank: int, micro_batches: int) -> Order:
    """What each rank computes, in order; ValueError (torch's) where a schedule does not take such numbers."""
    generator = SCHEDULES[name].generator
    if generator is None:
        return {"gpipe": schedules.gpipe, "1f1b": schedules.one_forward_one_backward}[name](ranks, micro_batches)
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=ranks * stages_per_rank,
            group_size=ranks,
            group_rank=0,
            submod=nn.Identity(),
            has_backward=False,
        )
        for index in range(stages_per_rank)
    ]
    listed = getattr(torch_schedules, generator)(stages, micro_batches).pipeline_order
    return [
        [step for action in listed[rank] if action is not None for step in steps_of(action)] for rank in range(ranks)
    ]


def steps_of(action: Any) -> Iterator[Step]:
    """torch's action as ours; one that overlaps others is those, one after the other."""
    for part in action.sub_actions or (action,):
        if part.computation_type.value in ("F", "B", "I", "W"):
            yield Step(part.computation_type.value, part.stage_index, part.microbatch_index)


class Stage(nn.Module):
    """Consecutive units of a net. The net's very last unit is not called: the step's own keyword arguments go to it."""

    def __init__(self, units: Mapping[str, nn.Module], *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.names = list(units)
        self.units = nn.ModuleList(units.values())
        self.is_first, self.is_last = is_first, is_last

    def forward(self, *inputs: Any) -> Any:
        units = list(self.units)[: -1 if self.is_last else None]
        if self.is_first and units:
            inputs = (units.pop(0)(*inputs),)
        (x,) = inputs
        for unit in units:
            x = unit(x)
        return tuple(map(whole, x)) if isinstance(x, tuple) else whole(x)


class Passed(NamedTuple):
    """What one stage hands to the next for one micro-batch."""

    tensors: Tensors
    is_tuple: bool  # or else the one tensor itself

    @property
    def value(self) -> Any:
        return self.tensors if self.is_tuple else self.tensors[0]

    @classmethod
    def of(cls, output: Any, names: Sequence[str]) -> Passed:
        """ValueError naming the module if the output of a stage, whose units are `names`, cannot be sent."""
        tensors = output if isinstance(output, tuple) else (output,)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(
                f"strategy.mesh.pipe: module {names[-1]} gives {type(output).__name__}, but only a tensor or a tuple "
                f"of tensors can go from one pipeline stage to the next; change what it returns, or choose "
                f"strategy=fsdp."
            )
        return cls(tensors, isinstance(output, tuple))


Shapes = list[tuple[torch.Size, torch.dtype]]

# What goes ahead of tensors of unknown shapes: whether they are a tuple, their number, and format, number of dims and
# dims of each.
HEADER_WORDS = 64
FORMATS = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


class Link:
    """Sends to and receives from the ranks of neighbouring stages. Shapes are told once, the first time."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, rank_of_stage: Callable[[int], int]) -> None:
        self.group, self.device, self.rank_of_stage = group, device, rank_of_stage
        self.told: dict[object, list[int]] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []

    def peer(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.rank_of_stage(stage))

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            work = dist.isend(sent, self.peer(to), group=self.group)
            self.sending.append((cast(dist.Work, work), sent))  # it must live until it is sent

    def receive(self, shapes: Shapes, source: int) -> list[tuple[dist.Work, Tensor]]:
        coming = []
        for shape, dtype in shapes:
            buffer = torch.empty(shape, dtype=dtype, device=self.device)
            coming.append((cast(dist.Work, dist.irecv(buffer, self.peer(source), group=self.group)), buffer))
        return coming

    def tell(self, key: object, passed: Passed, to: int) -> None:
        """Let a stage know what shapes come under `key`, unless it knows."""
        if key in self.told:
            return
        words = [int(passed.is_tuple), len(passed.tensors)]
        for tensor in passed.tensors:
            words += [FORMATS.index(tensor.dtype), tensor.dim(), *tensor.shape]
        self.told[key] = words
        self.send([torch.tensor(words + [0] * (HEADER_WORDS - len(words)), device=self.device)], to)

    def hear(self, key: object, source: int) -> tuple[bool, Shapes]:
        """Whether a tuple comes under `key`, and of what shapes."""
        if key not in self.told:
            (header,) = self.receive([(torch.Size([HEADER_WORDS]), torch.int64)], source)
            header[0].wait()
            self.told[key] = header[1].tolist()
        is_tuple, count, *rest = self.told[key]
        words = iter(rest)
        shapes = []
        for _ in range(count):
            dtype, dims = FORMATS[next(words)], next(words)
            shapes.append((torch.Size(next(words) for _ in range(dims)), dtype))
        return bool(is_tuple), shapes

    def finish(self) -> None:
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()


class Kept(NamedTuple):
    """What a stage keeps of a micro-batch between its forward and its backward."""

    inputs: Tensors
    outputs: Tensors


Coming = list[tuple[dist.Work, Tensor]]


class Pipeline:
    """The stages of one rank, and what is under way between them and their neighbours.

    whole_backwards: where a schedule takes a backward apart, do all of it in the half that others wait for. Taken
    apart, a checkpointed block would run its forward again for the inputs, and once more for each of its weights.
    """

    def __init__(self, stages: Mapping[int, Stage], num_stages: int, link: Link, *, whole_backwards: bool) -> None:
        self.stages, self.num_stages, self.link = stages, num_stages, link
        self.whole_backwards = whole_backwards

    def run(
        self,
        steps: Sequence[Step],
        *,
        key: object,
        first: Callable[[int], tuple[Any, ...]],
        last: Callable[[int, Any], Tensor | None],
        context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Carry out one rank's steps, transfers among them (see `schedules.with_transfers`).

        first: the net's arguments for a micro-batch, asked for on the rank that has the first stage. last: takes what
        the last stage gives, and returns the loss that goes backward, or None where there are no backwards. context:
        entered around each forward. key: equal for runs in which what passes between stages has the same shapes.
        """
        self.key, self.first, self.last, self.context = key, first, last, context
        self.outputs: dict[tuple[int, int], Passed] = {}
        self.inputs: dict[tuple[int, int], tuple[bool, Coming | Tensors]] = {}
        self.kept: dict[tuple[int, int], Kept] = {}
        self.gradients: dict[tuple[int, int], Coming | Tensors] = {}  # of a stage's outputs
        self.input_gradients: dict[tuple[int, int], Tensors] = {}
        self.weight_groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for step in steps:
            getattr(self, step.kind.lower())(step.stage, step.micro)
        self.link.finish()

    def f(self, stage: int, micro: int) -> None:
        module = self.stages[stage]
        with self.context():
            if module.is_first:
                taken: Tensors = ()
                output = module(*self.first(micro))
            else:
                is_tuple, coming = self.inputs.pop((stage, micro))
                taken = tuple(map(leaf, landed(coming)))
                output = module(taken if is_tuple else taken[0])
            if module.is_last:
                loss = self.last(micro, output)
                outputs: Tensors = () if loss is None else (loss,)
            else:
                passed = Passed.of(output, module.names)
                outputs = passed.tensors
        if torch.is_grad_enabled():
            self.kept[stage, micro] = Kept(taken, outputs)
        if module.is_last:
            return
        if stage + 1 in self.stages:
            self.inputs[stage + 1, micro] = passed.is_tuple, passed.tensors
        else:
            self.outputs[stage, micro] = passed

    def b(self, stage: int, micro: int) -> None:
        kept = self.kept.pop((stage, micro))
        roots = [output for output in kept.outputs if output.requires_grad]
        torch.autograd.backward(roots, self.gradients_of(stage, micro, kept))
        self.give_back(stage, micro, [tensor.grad for tensor in kept.inputs], kept)

    def i(self, stage: int, micro: int) -> None:
        if stage == 0:
            return  # it has nobody to hand a gradient to: all of its backward is left to `w`
        if self.whole_backwards:
            self.b(stage, micro)
            return
        kept = self.kept.pop((stage, micro))
        roots = [output for output in kept.outputs if output.requires_grad]
        gradients = self.gradients_of(stage, micro, kept)
        inputs = [tensor for tensor in kept.inputs if tensor.requires_grad]
        _, groups = stage_backward_input(roots, gradients, inputs, self.stages[stage].parameters())
        self.weight_groups[stage, micro] = groups
        self.give_back(stage, micro, [tensor.grad for tensor in kept.inputs], kept)

    def w(self, stage: int, micro: int) -> None:
        if stage == 0:
            self.b(stage, micro)
        elif not self.whole_backwards:
            stage_backward_weight(self.stages[stage].parameters(), self.weight_groups.pop((stage, micro)))

    def gradients_of(self, stage: int, micro: int, kept: Kept) -> list[Tensor]:
        """Gradients of those outputs of a stage that take one."""
        if self.stages[stage].is_last:
            return [torch.ones_like(loss) for loss in kept.outputs if loss.requires_grad]
        floating = [output for output in kept.outputs if output.is_floating_point()]
        gradients = landed(self.gradients.pop((stage, micro)))
        return [gradient for output, gradient in zip(floating, gradients, strict=True) if output.requires_grad]

    def give_back(self, stage: int, micro: int, gradients: Sequence[Tensor | None], kept: Kept) -> None:
        """Hand on the gradients of what a stage took: of every floating-point tensor, zeros where it was of no use."""
        back = tuple(
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(kept.inputs, gradients, strict=True)
            if tensor.is_floating_point()
        )
        if stage - 1 in self.stages:
            self.gradients[stage - 1, micro] = back
        elif stage > 0:
            self.input_gradients[stage, micro] = back

    def send_f(self, stage: int, micro: int) -> None:
        passed = self.outputs.pop((stage, micro))
        self.link.tell((self.key, stage, micro), passed, stage + 1)
        self.link.send(passed.tensors, stage + 1)

    def recv_f(self, stage: int, micro: int) -> None:
        is_tuple, shapes = self.link.hear((self.key, stage - 1, micro), stage - 1)
        self.inputs[stage, micro] = is_tuple, self.link.receive(shapes, stage - 1)

    def send_b(self, stage: int, micro: int) -> None:
        self.link.send(self.input_gradients.pop((stage, micro)), stage - 1)

    def recv_b(self, stage: int, micro: int) -> None:
        outputs = self.kept[stage, micro].outputs
        shapes = [(output.shape, output.dtype) for output in outputs if output.is_floating_point()]
        self.gradients[stage, micro] = self.link.receive(shapes, stage + 1)


def landed(coming: Sequence[Any]) -> Tensors:
    """Tensors once they are there; those of a stage on the same rank are."""
    for part in coming:
        if not isinstance(part, Tensor):
            part[0].wait()
    return tuple(part if isinstance(part, Tensor) else part[1] for part in coming)


def leaf(tensor: Tensor) -> Tensor:
    """What a stage took, as the start of a graph of its own."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() and torch.is_grad_enabled())
