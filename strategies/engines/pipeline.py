"""Runs a pipeline schedule on one rank: forwards, backwards, and when to send and receive what goes between stages.

Torch's schedules say who does what when; carrying it out is done here, so that micro-batches may differ in size, no
forward is run only to learn shapes, and the loss is the user's own step. What is private in torch, tested on 2.13:
`pipelining.schedules.Schedule*` on stages that exist by name alone, for their `pipeline_order`, and
`pipelining._backward.stage_backward_input` and `stage_backward_weight`, for half a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from strategies import schedules
from strategies.engines.link import Arrival, Coming, Link, Passed, Tensors, Transfer, landed
from strategies.engines.tensor import whole
from strategies.schedules import SCHEDULES, Name, Order, Step


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
        self.around: Callable[[Step], AbstractContextManager[None]] = lambda step: nullcontext()  # to watch each step

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
            with self.around(step):
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
