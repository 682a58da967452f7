"""Tries a plan's tensor styles before ranks start: one process that is told it were one of several, on no data.

A plan can name modules that each can be split and yet do not go together: a product of queries, keys and values in one,
whose parts the net takes by their whole sizes. torch would say so on every rank, deep inside of it.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.plan import ParallelPlan
from models.stats import call_step, measure, without_trainer
from strategies.engines import tensor
from strategies.engines.grid import is_inside, sequence_units
from strategies.engines.loss_terms import loss_of

if TYPE_CHECKING:
    from strategies.grid import Grid

SHOWN = 4  # styles of a unit


def rehearse(module: pl.LightningModule, spec: Grid, sample: Any) -> None:
    """ValueError naming the module that fails in a training step as a tensor rank takes it.

    `sample` is a batch of one sample. What cannot be run on the meta device, even whole, is not tried.
    """
    try:
        whole = copy.deepcopy(module).to("meta")
        stats = measure(whole, sample)
    except Exception:  # noqa: BLE001  # one sample, values, a Trainer: whatever a user's step needs and has not got here
        return
    plan = cast(ParallelPlan, whole.plan)
    net = whole.get_submodule(plan.net)
    chain = plan.expand(fqn for fqn, _ in net.named_modules())
    with pretended(spec.tensor) as mesh:
        inside = sequence_units(spec, stats, net, plan, chain)
        units = {fqn: net.get_submodule(fqn) for fqn in chain.modules}
        for fqn, unit in units.items():
            tensor.split_unit(unit, fqn, plan, mesh, sequence=fqn in inside, loss_parallel=spec.loss_parallel)
        if inside:
            tensor.bound_sequence(units, inside, plan, mesh)
        units[chain.modules[-1]].register_forward_hook(lambda _, __, output: tensor.plain_tree(output))
        entered = entered_modules(net)
        try:
            with without_trainer(), loss_parallel():
                output = call_step(whole, move_data_to_device(sample, torch.device("meta")))
                loss_of(output).backward()
        except Exception as error:
            raise refusal(error, entered, net, plan, list(units), spec) from error


@contextmanager
def pretended(ranks: int) -> Iterator[DeviceMesh]:
    """A tensor axis on which this process is the first, and of which the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        # By a name of its own: torch caches by the mesh where a rank's part of a tensor lies, and takes meshes of the
        # same ranks and names for one, whichever rank asks.
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=("pretended",))
    finally:
        dist.destroy_process_group()


def entered_modules(net: nn.Module) -> list[str]:
    """FQNs of the modules that have been entered and not left, from now on."""
    entered: list[str] = []

    def leave(*_: Any) -> None:
        entered.pop()

    for fqn, part in net.named_modules():
        part.register_forward_pre_hook(lambda *_, fqn=fqn: entered.append(fqn), prepend=True)
        part.register_forward_hook(leave)
    return entered


def refusal(
    error: Exception, entered: list[str], net: nn.Module, plan: ParallelPlan, units: list[str], spec: Grid
) -> ValueError:
    unit = next((fqn for fqn in units if entered and is_inside(entered[-1], [fqn])), None)
    styles = {
        fqn: style
        for fqn, _ in net.named_modules()
        if (style := plan.style(fqn)) and (unit is None or is_inside(fqn, [unit]))
    }
    said = ", ".join(f"{fqn} {style}" for fqn, style in list(styles.items())[:SHOWN])
    where = f"{entered[-1]} ({type(net.get_submodule(entered[-1])).__name__})" if unit else "the step"
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = (str(error).strip() or "no message").splitlines()[0]
    return ValueError(
        f"strategy.mesh.tensor={spec.tensor}: {where} does not run with its modules split as plan.tensor says ({said}"
        f"{', ...' if styles.keys() - list(styles)[:SHOWN] else ''}): {type(error).__name__}: {what} "
        f"({Path(last.filename).name}:{last.lineno}); correct plan.tensor, or choose strategy=fsdp."
    )
