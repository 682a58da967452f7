"""Over how many things a micro-batch's loss is a mean, and so what it weighs in the mean over the global batch.

Ranks and micro-batches average their losses alike. Where targets are left out of a loss (padding, prompts), that is a
mean of means, in which a target counts the more the fewer there are beside it. Here each loss weighs as much as it has
terms, so that every way to cut a global batch gives the mean over all of its terms, which one process with the whole
batch computes (transformers#34191 tells of the same mistake).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

NUM_TARGETS = "num_targets"  # by which a training step may say over how many things its loss is a mean
MEAN, SUM = 1, 2  # at::Reduction

# Nodes of autograd's graph, by their names in torch 2.11 to 2.15, behind which a loss is the same mean, or a multiple.
PASSES_ON = {
    "AliasBackward0",
    "CloneBackward0",
    "MulBackward0",
    "MulBackward1",
    "NegBackward0",
    "SelectBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
    # torch's and DeepSpeed's own, around what a module returns.
    "RedistributeBackward",
    "_ToTorchTensorBackward",
    "PostBackwardFunctionModuleBackward",
    "PreBackwardFunctionForModuleBackward",
    "PreBackwardFunctionModuleBackward",
}
ADDS_UP = {"AddBackward0", "SubBackward0", "StackBackward0", "CatBackward0"}
# Means over all elements of their input, if they were asked for a mean.
MEANS_OF_ELEMENTS = {
    "BinaryCrossEntropyBackward0",
    "BinaryCrossEntropyWithLogitsBackward0",
    "HuberLossBackward0",
    "L1LossBackward0",
    "MseLossBackward0",
    "SmoothL1LossBackward0",
    "SoftMarginLossBackward0",
}


class Terms(NamedTuple):
    """What a loss is a mean over."""

    number: Tensor | float
    at_most: float  # if none were left out; the same on every rank where shapes are
    varies: bool = False  # with the samples


def terms_in(node: Any) -> Iterator[Terms]:
    """The means that a loss is made of by adding up and multiplying, as autograd's graph shows them from `node` on."""
    if node is None:
        return
    name, inputs = node.name(), [inner for inner, _ in node.next_functions]
    if name in ("NllLossBackward0", "NllLoss2DBackward0") and node._saved_reduction == MEAN:
        # The sum of the classes' weights, if there are any.
        yield Terms(whole(node._saved_total_weight), node._saved_target.numel(), varies=True)
    elif name in MEANS_OF_ELEMENTS and node._saved_reduction == MEAN:
        yield same_always(node._saved_self.numel())
    elif name in ("MeanBackward0", "MeanBackward1") and inputs[0] is not None and inputs[0].name() not in ADDS_UP:
        yield same_always(node._saved_self_sym_numel)
    elif name in ("DivBackward0", "DivBackward1") and (inputs[1:] in ([], [None])):
        summed, divisor = inputs[0], node._saved_other
        numel = numel_summed(summed)
        if numel is not None:
            yield divided(numel, whole(divisor))
        else:
            yield from terms_in(summed)
    elif name in ADDS_UP or name in ("MeanBackward0", "SumBackward0"):
        for inner in inputs:
            yield from terms_in(inner)
    elif name in PASSES_ON and len(given := [inner for inner in inputs if inner is not None]) == 1:
        yield from terms_in(given[0])


def whole(number: Any) -> Any:
    """A count as a plain tensor; where logits are split over ranks it is a DTensor, whole on each of them."""
    return number.to_local() if isinstance(number, DTensor) else number


def divided(numel: float, divisor: Tensor | float) -> Terms:
    """A sum of `numel` numbers by their number, or by that of those that count."""
    if not isinstance(divisor, Tensor):
        return same_always(divisor)
    if divisor.device.type != "cpu":
        return Terms(divisor.detach(), numel, varies=True)  # not read here: the device would have to be waited for
    with _disable_current_modes():  # they take a number that Python gave for no tensor
        number = float(divisor)
    # Where it is more, what is summed are sums themselves, of chunks.
    return Terms(number, max(numel, number), varies=True)


def numel_summed(node: Any) -> float | None:
    """Of what a node adds up; None if it does something else."""
    if node is None:
        return None
    if node.name() in ("SumBackward0", "SumBackward1"):
        return float(torch.Size(node._saved_self_sym_sizes).numel())
    if node.name() in ("NllLossBackward0", "NllLoss2DBackward0") and node._saved_reduction == SUM:
        return float(node._saved_target.numel())
    if node.name() in MEANS_OF_ELEMENTS and node._saved_reduction == SUM:
        return float(node._saved_self.numel())
    return None


def same_always(count: float) -> Terms:
    return Terms(float(count), float(count))


class LossTerms:
    """Weighs the losses of a step's micro-batches, and says at its end by what their weights are to be divided.

    What they weigh together is not known before the last forward, so each loss counts by its terms in units that are
    fixed for the run, and all gradients are multiplied by `factor` once they are there: exactly 1 where no target is
    left out of any loss.
    """

    def __init__(self) -> None:
        self.unit: float | None = None  # terms of a micro-batch that leaves none out
        self.factor = 1.0  # of the step whose gradients are being stepped with
        self.is_mixed = False  # whether a loss adds up means over different numbers of things
        self.clear()

    def clear(self) -> None:
        """Begin another step."""
        self.total: Tensor | float = 0.0  # of what its losses weigh
        self.share = 0.0  # of a whole micro-batch's samples, what they were made of
        self.mixed: Tensor | float = 0.0

    def weight_of(self, output: Any, *, share: float, samples: int, group: dist.ProcessGroup | None) -> Tensor | float:
        """What a training step's loss weighs, `share` where nothing is known of it; counts it.

        share: the part of a micro-batch's samples that it was made of, for a pipeline cuts it once more.
        samples: of a whole micro-batch. group: the ranks that ask the same at the same time.
        """
        found = self.terms_of(output, share, samples)
        if self.unit is None:
            # All ranks ask, whatever each has found in its first loss: else some would wait for the others.
            self.unit = agreed(found.at_most / share if found else 0.0, group) or float(samples)
        weight: Tensor | float = share
        if found is not None:
            weight = found.number / self.unit
            if found.varies:
                weight = weight * is_something(loss_of(output))
        self.total = self.total + (weight.double() if isinstance(weight, Tensor) else weight)
        self.share += share
        return weight

    def terms_of(self, output: Any, share: float, samples: int) -> Terms | None:
        loss = loss_of(output)
        if isinstance(output, Mapping) and NUM_TARGETS in output:
            return Terms(declared(output[NUM_TARGETS]), samples * share, varies=True)
        terms = list(terms_in(loss.grad_fn))
        counted = [term for term in terms if term.varies]
        for other in terms:
            if counted and other is not counted[0]:
                self.mixed = self.mixed + (other.number != counted[0].number)
        # Where some are left out, those count: a penalty on weights, which has no terms, is the same in each loss.
        return next(iter(counted or terms), None)

    def settle(self, total: float, share: float, *, is_mixed: bool) -> None:
        """Take what all ranks' losses weigh together, and of how many micro-batches they were made."""
        self.factor = share / total if total else 1.0
        self.is_mixed |= is_mixed
        self.clear()


def loss_of(output: Any) -> Tensor:
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
    return loss


def is_something(loss: Tensor) -> Tensor | float:
    """0 of a loss that is exactly 0: a sum over no target, divided by their number or 1, whichever is more."""
    there = loss.detach() != 0
    return float(there) if loss.device.type == "cpu" else there


def declared(count: Any) -> Tensor | float:
    """What a step gave as `num_targets`; ValueError for what is no number."""
    if isinstance(count, Tensor) and count.numel() == 1:
        return count.detach().reshape(())
    if isinstance(count, int | float):
        return float(count)
    raise ValueError(f"training_step returned {NUM_TARGETS}={count!r:.80}; give the number of targets in the loss.")


def agreed(unit: float, group: dist.ProcessGroup | None) -> float:
    """The largest of the ranks' units; collective, once in a run."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return unit
    largest = torch.tensor(unit, dtype=torch.float64, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return float(largest)


def times(loss: Tensor, weight: Tensor | float) -> Tensor:
    """`loss * weight`, and 0, with gradients of 0, where that is 0, though the loss, a mean over nothing, is NaN."""
    if isinstance(weight, float) and weight != 0.0:
        return loss if weight == 1.0 else loss * weight
    weight = torch.as_tensor(weight).to(loss.device, loss.dtype)
    is_empty = weight == 0
    for node in means_behind(loss.grad_fn):
        # A division by 0 makes NaN of a gradient that is 0, too.
        node.register_hook(
            lambda inner, _: tuple(None if one is None else one.masked_fill(is_empty, 0) for one in inner)
        )
    return loss.masked_fill(is_empty, 0) * weight


def means_behind(node: Any) -> Iterator[Any]:
    """Nodes that may have divided by 0."""
    if node is None:
        return
    if node.name() in ("DivBackward0", "MeanBackward0", "MeanBackward1"):
        yield node
    if node.name() in PASSES_ON | ADDS_UP | {"DivBackward0"}:
        for inner, _ in node.next_functions:
            yield from means_behind(inner)
