"""What a step returns: a loss that can be gone backward from, or a line that says why not; and the rest of it.

Hooks and callbacks are given what a step returned. In a pipeline that is made on the last stage, a part for each
micro-batch: it is joined, and taken to the other ranks, where somebody looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_map

LOSS = "loss"  # under which Lightning looks for it in a dict
LOOK_AT_NOTHING = ("launch.", "lightning.", "strategies.", "tracking.")  # whose callbacks take the loss alone


def check_output(module: pl.LightningModule, output: Any) -> None:
    """ValueError if Lightning could make nothing of what a training step has returned."""
    loss = output.get(LOSS) if isinstance(output, Mapping) else output
    if not module.automatic_optimization:
        if loss is not None and not isinstance(loss, Tensor):
            raise refused(
                module, f"returns {shown(output)}", "return a tensor, a dict with one as its loss, or nothing"
            )
        return
    if output is None:  # Lightning goes on without a step, where it can
        return
    if isinstance(output, Mapping) and loss is None:
        raise refused(
            module, f"returns a dict of {', '.join(map(str, output)) or 'nothing'}", "give its loss as 'loss'"
        )
    if not isinstance(loss, Tensor):
        raise refused(module, f"returns {shown(output)}", "return a tensor, or a dict with one as its loss")
    if is_overridden("backward", module, pl.LightningModule):
        return  # it knows what to do with it
    if not loss.is_floating_point():
        raise refused(module, f"returns a loss of {name(loss)}", "return a loss of real numbers")
    if loss.numel() != 1:
        raise refused(module, f"returns a loss of shape {tuple(loss.shape)}", "return one number, such as its mean")
    if torch.is_grad_enabled() and not loss.requires_grad:
        way = "take it with gradients, and from what the optimizer trains"
        raise refused(module, "returns a loss that depends on no parameter (it has no gradient)", way)


def refused(module: pl.LightningModule, what: str, way_out: str) -> ValueError:
    kind = type(module)
    code = inspect.unwrap(kind.training_step).__code__
    place = f"{Path(code.co_filename).name}:{code.co_firstlineno}"
    return ValueError(
        f"model: {kind.__name__}.training_step ({place}) {what}, on rank {module.global_rank}; {way_out}."
    )


def shown(output: Any) -> str:
    """What kind of thing a step gave, in words."""
    if isinstance(output, Mapping):
        return f"a dict whose loss is {type(output[LOSS]).__name__}"
    return type(output).__name__


def name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- a pipeline's -----------------------------------------------------------------------------------------------------


def looked_at(module: pl.LightningModule, hook: str) -> bool:
    """Whether the module, or a callback of the user's own, is given what steps return by this hook."""
    callbacks: Sequence[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
    own = [one for one in callbacks if not type(one).__module__.startswith(LOOK_AT_NOTHING)]
    return is_overridden(hook, module, pl.LightningModule) or any(is_overridden(hook, one, pl.Callback) for one in own)


def rest_of(output: Any) -> dict[str, Any]:
    """What a step returned beside its loss, without its graph."""
    rest = {key: value for key, value in output.items() if key != LOSS} if isinstance(output, Mapping) else {}
    return {key: tree_map(detached, value) for key, value in rest.items()}


def detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def joined_rest(rests: Sequence[Mapping[str, Any]], rows: Sequence[int], owner: str) -> dict[str, Any]:
    """The same of all micro-batches, of so many rows each, as one step would have returned it."""

    def join(key: str) -> Any:
        try:
            parts = [rest[key] for rest in rests]
            return tree_map(lambda *same: joined(same, rows), *parts, is_leaf=lambda node: is_by_rows(node, rows[0]))
        except (KeyError, ValueError):
            raise ValueError(
                f"strategy.mesh.pipe: {owner}.training_step returns a {key!r} that cannot be joined from those of its "
                f"micro-batches; give it a row for each sample or as a mean, or choose strategy=fsdp."
            ) from None

    return {key: join(key) for key in rests[0]}


def joined(same: Sequence[Any], rows: Sequence[int]) -> Any:
    """One leaf: its rows together, the mean of a number, or what is the same for all."""
    one = same[0]
    if all(
        isinstance(part, Tensor) and part.ndim and len(part) == count for part, count in zip(same, rows, strict=True)
    ):
        return torch.cat(list(same))
    if all(is_by_rows(part, count) for part, count in zip(same, rows, strict=True)):
        return [thing for part in same for thing in part]
    if all(isinstance(part, float) or (isinstance(part, Tensor) and is_number(part)) for part in same):
        return sum(part * (count / sum(rows)) for part, count in zip(same, rows, strict=True))
    if all(torch.equal(part, one) if isinstance(part, Tensor) else part == one for part in same):
        return one
    raise ValueError


def is_by_rows(node: Any, rows: int) -> bool:
    """Whether it is a list of which each row has an element, such as a name, or a dict of what is seen in an image."""
    return type(node) is list and len(node) == rows and not any(isinstance(one, Tensor | list | tuple) for one in node)


def is_number(part: Tensor) -> bool:
    return part.ndim == 0 and part.is_floating_point()
