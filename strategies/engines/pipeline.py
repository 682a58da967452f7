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
from typing import Any, Literal, NamedTuple, cast

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


# What goes ahead of tensors that another rank sends: rows of the micro-batch, whether they are a tuple, their number,
# and format, number of dims and dims of each. Nothing else tells their shapes: a step may trim or crop as it likes.
HEADER_WORDS = 64
FORMATS = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


class Passed(NamedTuple):
    """What one stage hands to the next for one micro-batch."""

    tensors: Tensors
    is_tuple: bool  # or else the one tensor itself
    rows: int  # of what the net was called with

    @classmethod
    def of(cls, output: Any, rows: int, names: Sequence[str]) -> Passed:
        """ValueError naming the module if the output of a stage, whose units are `names`, cannot be sent."""
        tensors = output if isinstance(output, tuple) else (output,)
        gives = f"strategy.mesh.pipe: module {names[-1]} gives"
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(
                f"{gives} {type(output).__name__}, but only a tensor or a tuple of tensors can go from one pipeline "
                f"stage to the next; change what it returns, or choose strategy=fsdp."
            )
        for tensor in tensors:
            if tensor.dtype not in FORMATS:
                raise ValueError(
                    f"{gives} {tensor.dtype}, which cannot go from one pipeline stage to the next; convert it there, "
                    f"or choose strategy=fsdp."
                )
        passed = cls(tensors, isinstance(output, tuple), rows)
        if len(passed.header) > HEADER_WORDS:
            raise ValueError(
                f"{gives} {len(tensors)} tensors of {sum(tensor.dim() for tensor in tensors)} dims together, more than "
                f"can go from one pipeline stage to the next; stack some, or choose strategy=fsdp."
            )
        return passed

    @property
    def header(self) -> list[int]:
        words = [self.rows, int(self.is_tuple), len(self.tensors)]
        for tensor in self.tensors:
            words += [FORMATS.index(tensor.dtype), tensor.dim(), *tensor.shape]
        return words


Shapes = list[tuple[torch.Size, torch.dtype]]
Coming = list[tuple[dist.Work | None, Tensor]]  # no work where there is nothing to wait for


class Transfer(NamedTuple):
    """Outputs (F) or gradients of inputs (B) of one stage, which go to the next or to the one before."""

    kind: Literal["F", "B"]
    stage: int
    micro: int

    @property
    def tag(self) -> int:
        """Keeps apart what goes between two ranks at once; the one after it is that of the header."""
        return (self.stage << 16 | self.micro) << 2 | (self.kind == "B") << 1


class Arrival:
    """A `Passed` of another rank: its header is under way, and its tensors are received once that is read."""

    def __init__(self, transfer: Transfer, work: dist.Work, header: Tensor) -> None:
        self.transfer, self.work, self.header = transfer, work, header
        self.coming: Coming | None = None

    def read(self) -> Shapes:
        self.work.wait()
        self.rows, is_tuple, count, *rest = self.header.tolist()
        self.is_tuple = bool(is_tuple)
        words = iter(rest)
        shapes = []
        for _ in range(count):
            dtype, dims = FORMATS[next(words)], next(words)
            shapes.append((torch.Size(next(words) for _ in range(dims)), dtype))
        return shapes


class Link:
    """Sends to and receives from the ranks of neighbouring stages.

    Headers are read by the CPU and go through gloo: through NCCL, each would make the CPU wait for the GPU. NCCL knows
    no tags, and two ranks must start whatever passes between them in one order; so there, but only there, a header is
    read before its tensors are needed: when something else is to go between the same ranks.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, rank_of_stage: Callable[[int], int]) -> None:
        self.group, self.device, self.rank_of_stage = group, device, rank_of_stage
        self.in_order = dist.get_backend(group) == "nccl"
        self.header_group = group
        if self.in_order:
            ranks = dist.get_process_group_ranks(group)
            self.header_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.headers: Coming = []  # being sent
        self.sending: dict[Transfer, Coming] = {}
        self.unread: dict[int, list[Arrival]] = {}  # by rank, in the order of their sends

    def peer(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.rank_of_stage(stage))

    def send(self, transfer: Transfer, tensors: Sequence[Tensor], to: int, header: Sequence[int] = ()) -> None:
        """Start to send; `arrived(transfer)` lets go of what is sent, if it is over no earlier."""
        for over in [key for key, parts in self.sending.items() if all(map(is_over, parts))]:
            del self.sending[over]
        rank = self.peer(to)
        self.keep_order(rank)
        sent = self.sending.setdefault(transfer, [])  # it must live until it is sent
        if header:
            words = torch.tensor([*header, *[0] * (HEADER_WORDS - len(header))])
            self.headers.append((dist.isend(words, rank, group=self.header_group, tag=transfer.tag + 1), words))
        for tensor in tensors:
            whole_tensor = tensor.detach().contiguous()
            if tensor.numel():
                work = dist.isend(in_bytes(whole_tensor), rank, group=self.group, tag=transfer.tag)
                sent.append((work, whole_tensor))

    def arrived(self, transfer: Transfer) -> None:
        """An answer to what was sent is there."""
        wait(self.sending.pop(transfer, []))

    def expect(self, transfer: Transfer) -> Arrival:
        """A stage's outputs, whose header will tell their shapes."""
        rank, header = self.peer(transfer.stage), torch.empty(HEADER_WORDS, dtype=torch.int64)
        work = dist.irecv(header, rank, group=self.header_group, tag=transfer.tag + 1)
        arrival = Arrival(transfer, cast(dist.Work, work), header)
        if self.in_order:
            self.unread.setdefault(rank, []).append(arrival)
        return arrival

    def take(self, arrival: Arrival) -> Passed:
        """What has been expected, once it is there."""
        self.keep_order(self.peer(arrival.transfer.stage))
        if arrival.coming is None:
            arrival.coming = self.start(arrival.transfer, arrival.read())
        return Passed(landed(arrival.coming), arrival.is_tuple, arrival.rows)

    def receive(self, transfer: Transfer, shapes: Shapes) -> Coming:
        """Start to receive a stage's gradients."""
        self.keep_order(self.peer(transfer.stage))
        return self.start(transfer, shapes)

    def keep_order(self, rank: int) -> None:
        """Start to receive all that has been expected of a rank, where what comes next would otherwise overtake it."""
        for arrival in self.unread.pop(rank, []):
            arrival.coming = self.start(arrival.transfer, arrival.read())

    def start(self, transfer: Transfer, shapes: Shapes) -> Coming:
        coming: Coming = []
        for shape, dtype in shapes:
            buffer = torch.empty(shape, dtype=dtype, device=self.device)
            if buffer.numel():
                rank = self.peer(transfer.stage)
                work = dist.irecv(in_bytes(buffer), rank, group=self.group, tag=transfer.tag)
                coming.append((work, buffer))
            else:
                coming.append((None, buffer))
        return coming

    def finish(self) -> None:
        for parts in (self.headers, *self.sending.values()):
            wait(parts)
        self.headers.clear()
        self.sending.clear()


def in_bytes(tensor: Tensor) -> Tensor:
    """Backends know some formats only, and need to know none."""
    return tensor.view(-1).view(torch.uint8)


def is_over(part: tuple[dist.Work | None, Tensor]) -> bool:
    """Gloo's works are, only once they have been waited for."""
    return part[0] is None or part[0].is_completed()


def wait(parts: Coming) -> None:
    for work, _ in parts:
        if work is not None:
            work.wait()


def landed(parts: Coming) -> Tensors:
    wait(parts)
    return tuple(tensor for _, tensor in parts)


class Kept(NamedTuple):
    """What a stage keeps of a micro-batch between its forward and its backward."""

    inputs: Tensors
    outputs: Tensors


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
        first: Callable[[int], tuple[tuple[Any, ...], int]],
        last: Callable[[int, Any, int], Tensor | None],
        context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Carry out one rank's steps, transfers among them (see `schedules.with_transfers`).

        first: the net's arguments for a micro-batch and their rows, asked for on the rank that has the first stage.
        last: takes what the last stage gives, and these rows, and returns the loss that goes backward, or None where
        there are no backwards. context: entered around each forward.
        """
        self.first, self.last, self.context = first, last, context
        self.outputs: dict[tuple[int, int], Passed] = {}
        self.inputs: dict[tuple[int, int], Arrival | Passed] = {}
        self.kept: dict[tuple[int, int], Kept] = {}
        self.gradients: dict[tuple[int, int], Coming] = {}  # of a stage's outputs
        self.input_gradients: dict[tuple[int, int], Tensors] = {}
        self.weight_groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for step in steps:
            getattr(self, step.kind.lower())(step.stage, step.micro)
        self.link.finish()
        for store in (self.outputs, self.inputs, self.kept, self.gradients, self.input_gradients, self.weight_groups):
            store.clear()
        del self.first, self.last, self.context  # they hold the batch

    def f(self, stage: int, micro: int) -> None:
        module = self.stages[stage]
        with self.context():
            if module.is_first:
                taken: Tensors = ()
                arguments, rows = self.first(micro)
                output = module(*arguments)
            else:
                tensors, is_tuple, rows = self.input_of(stage, micro)
                taken = tuple(map(leaf, tensors))
                handed = tuple(map(handed_on, taken))
                output = module(handed if is_tuple else handed[0])
            if module.is_last:
                loss = self.last(micro, output, rows)
                outputs: Tensors = () if loss is None else (loss,)
            else:
                passed = Passed.of(output, rows, module.names)
                outputs = passed.tensors
        if torch.is_grad_enabled():
            self.kept[stage, micro] = Kept(taken, outputs)
        if module.is_last:
            return
        if stage + 1 in self.stages:
            self.inputs[stage + 1, micro] = passed
        else:
            self.outputs[stage, micro] = passed

    def input_of(self, stage: int, micro: int) -> Passed:
        taken = self.inputs.pop((stage, micro))
        return self.link.take(taken) if isinstance(taken, Arrival) else taken

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
        floating = [output for output in kept.outputs if takes_gradient(output)]
        gradients = landed(self.gradients.pop((stage, micro)))
        self.link.arrived(Transfer("F", stage, micro))
        return [gradient for output, gradient in zip(floating, gradients, strict=True) if output.requires_grad]

    def give_back(self, stage: int, micro: int, gradients: Sequence[Tensor | None], kept: Kept) -> None:
        """Hand on the gradients of what a stage took: of every floating-point tensor, zeros where it was of no use."""
        back = tuple(
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(kept.inputs, gradients, strict=True)
            if takes_gradient(tensor)
        )
        if stage - 1 in self.stages:
            self.gradients[stage - 1, micro] = [(None, gradient) for gradient in back]
        elif stage > 0:
            self.input_gradients[stage, micro] = back

    def send_f(self, stage: int, micro: int) -> None:
        passed = self.outputs.pop((stage, micro))
        self.link.send(Transfer("F", stage, micro), passed.tensors, stage + 1, header=passed.header)

    def recv_f(self, stage: int, micro: int) -> None:
        self.inputs[stage, micro] = self.link.expect(Transfer("F", stage - 1, micro))

    def send_b(self, stage: int, micro: int) -> None:
        self.link.send(Transfer("B", stage, micro), self.input_gradients.pop((stage, micro)), stage - 1)

    def recv_b(self, stage: int, micro: int) -> None:
        outputs = self.kept[stage, micro].outputs
        shapes = [(output.shape, output.dtype) for output in outputs if takes_gradient(output)]
        self.gradients[stage, micro] = self.link.receive(Transfer("B", stage + 1, micro), shapes)


def takes_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def leaf(tensor: Tensor) -> Tensor:
    """What a stage took, as the start of a graph of its own."""
    return tensor.detach().requires_grad_(takes_gradient(tensor) and torch.is_grad_enabled())


def handed_on(tensor: Tensor) -> Tensor:
    """A leaf that wants a gradient, for a module that may change it in place: autograd lets none do so to the leaf."""
    return HandedOn.apply(tensor) if tensor.requires_grad else tensor


class HandedOn(torch.autograd.Function):
    """The same memory under another name, which is no view: autograd forbids changes of a leaf's views, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
