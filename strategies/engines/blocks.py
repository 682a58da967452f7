"""What is done to the blocks of a plan one by one, whatever the strategy: compiling, and activation checkpointing."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.plan import Chain, ParallelPlan


def chain_of(module: pl.LightningModule) -> Chain:
    """The plan's modules by their FQNs in `module` itself; empty where there is no plan."""
    plan: ParallelPlan = getattr(module, "plan", ParallelPlan(net=""))
    in_net = plan.expand(name for name, _ in module.get_submodule(plan.net).named_modules())
    return Chain(
        **{part: tuple(f"{plan.net}.{fqn}".lstrip(".") for fqn in fqns) for part, fqns in vars(in_net).items()}
    )


def blocks_of(module: pl.LightningModule) -> list[nn.Module]:
    """The plan's blocks, in forward order."""
    return [module.get_submodule(fqn) for fqn in chain_of(module).blocks]


def rework(blocks: Sequence[nn.Module], *, compiled: bool, checkpointing: str) -> None:
    """Compile `blocks` and checkpoint their activations as a run asks for it.

    Their parameters keep their FQNs, and hooks on the blocks run as before.
    """
    if compiled:
        compile_blocks(blocks)
    if checkpointing != "none":  # second, so that a checkpoint is around what is compiled
        checkpoint_activations(blocks, checkpointing)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Have each block's forward compiled at its first call.

    Equal blocks share their code, so that start-up does not grow with depth. The forward alone, unlike
    `nn.Module.compile`: hooks of the block, by which ZeRO-3 gathers its weights, stay outside of the graph.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward)


def checkpoint_activations(blocks: Sequence[nn.Module], mode: str) -> None:
    """Have blocks keep only their inputs for backward, and run forward again there (Chen et al. 2016).

    `mode` is "full" for every block, or "every_n" for blocks 0, n, 2n and so on. The second forward ends with the last
    tensor that backward needs, in the middle of the module that made it: that module's forward hooks are not run.
    """
    step = 1 if mode == "full" else int(mode.removeprefix("every_"))
    for block in blocks[::step]:
        block.forward = run_again_in_backward(block, block.forward)


def run_again_in_backward(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of `block`, checkpointed while the block trains."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        dtype = torch.get_default_dtype()
        # Keywords are bound, so that none is taken for one of checkpoint's own.
        return checkpoint(
            partial(forward, **kwargs),
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), Again(block, dtype)),
        )

    return checkpointed


class Again:
    """Around a forward that runs again in backward: it computes as the first time, and leaves no trace.

    Lightning sets the default format for `training_step`, but not for backward. Buffers, such as the statistics of a
    BatchNorm, have had their change. It can be entered more than once.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self.block, self.dtype = block, dtype

    def __enter__(self) -> None:
        self.outside = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.buffers = [(part, part._buffers.copy()) for part in self.block.modules() if part._buffers]
        for part, buffers in self.buffers:
            part._buffers.update({key: value if value is None else value.clone() for key, value in buffers.items()})

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.outside)
        for part, buffers in self.buffers:
            part._buffers.update(buffers)
