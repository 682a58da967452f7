"""GridEngine: the Lightning strategy that trains a LightningModule over pipe x data x tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.optim import Optimizer
from torchmetrics import Metric

from models.plan import Chain, ParallelPlan
from strategies.cutting import cut
from strategies.engines import sharding, tensor
from strategies.engines.averaging import AveragesExactly, share_buffers
from strategies.engines.batch_norm import synchronize
from strategies.engines.blocks import blocks_of, rework
from strategies.engines.checking import ChecksSteps
from strategies.engines.checkpoint import Held, persistent_buffers
from strategies.engines.finite import StepGuard
from strategies.engines.link import Link
from strategies.engines.materialize import Materializer
from strategies.engines.own_code import Reads, check_copies
from strategies.engines.pipeline import Pipeline, Stage
from strategies.engines.precision import name, narrow, precision_plugin
from strategies.engines.reach import Reach
from strategies.engines.shards import Shards, average, explain_empty
from strategies.engines.steps import PipelinedSteps
from strategies.engines.ties import Ties, find_ties
from strategies.schedules import rank_of
from strategies.spec import Run

if TYPE_CHECKING:
    from models.stats import ModelStats
    from strategies.grid import Grid


class GridEngine(ChecksSteps, AveragesExactly):
    """Cuts the net into stages, splits their matrices, shards what is left over the data ranks, and steps shards."""

    scaling = None  # the spec refuses float16

    def __init__(self, spec: Grid, run: Run) -> None:
        super().__init__(
            precision_plugin=precision_plugin(run.precision, "cuda" if run.on_gpu else "cpu"),
            process_group_backend="nccl" if run.on_gpu else "gloo",
            timeout=timedelta(seconds=run.timeout_s),
        )
        self.spec, self.run, self.guard = spec, run, StepGuard()
        self.at_boundary = True  # whether the next backward is its step's last
        self.contexts = ExitStack()
        self.steps: PipelinedSteps | None = None  # None where there is no pipe axis: Lightning's own steps will do

    @property
    def module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # --- processes --------------------------------------------------------------------------------------------------

    def setup_distributed(self) -> None:
        super().setup_distributed()
        self.make_mesh(self.root_device)

    def make_mesh(self, device: torch.device) -> None:
        spec = self.spec
        self.mesh = init_device_mesh(
            device.type,
            (spec.pipe, spec.replicas, spec.shards, spec.tensor),
            # Ranks that talk most are neighbours: tensor ranks, then those that gather each other's shards.
            mesh_dim_names=("pipe", "replicate", "shard", "tensor"),
        )
        self.pipe_group = self.mesh.get_group("pipe")
        self.pipe_rank, tensor_rank = self.mesh.get_local_rank("pipe"), self.mesh.get_local_rank("tensor")
        self.data_rank = self.mesh.get_local_rank("replicate") * spec.shards + self.mesh.get_local_rank("shard")
        ranks = self.mesh.mesh.flatten(1, 2)  # [pipe, data, tensor]
        groups = {
            (pipe, part): dist.new_group(ranks[pipe, :, part].tolist())
            for pipe in range(spec.pipe)
            for part in range(spec.tensor)
        }
        self.data_group = self.loss_group = groups[self.pipe_rank, tensor_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.spec.mesh.data_ranks, "rank": self.data_rank}

    def pipe_rank_of(self, stage: int) -> int:
        return rank_of(stage, self.spec.pipe, self.spec.kind)

    @property
    def sees_batches(self) -> bool:
        """Whether this rank looks at samples: between the first and the last stage their shapes will do."""
        return self.pipe_rank in {self.pipe_rank_of(0), self.pipe_rank_of(self.spec.num_stages - 1)}

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return super().batch_to_device(batch, device, dataloader_idx) if self.sees_batches else batch

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        # All ranks of one data rank log the same: in a sum over the world they would count as many times.
        adds_up = "sum" in str(reduce_op).lower()
        return super().reduce(tensor, group or (self.data_group if adds_up else None), reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Over all ranks: Lightning counts those that decide in a sum, which is one over data ranks here."""
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    # --- the model --------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self.module
        self.spec.check_module(module, self.run)  # again: a module's own setup() may have changed it
        explain_empty(module, self.spec.name)
        self.precision_plugin.convert_module(module)  # in place
        self.spread(module, self.root_device)
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                metric.process_group = self.data_group
        self.contexts.enter_context(loss_parallel())
        self.model = module
        self.setup_optimizers(trainer)
        self.shards = Shards(self.optimizers[0], self.spec, self.ties.duplicates, self.spec.name)
        self.setup_precision_plugin()
        self.shards.connect()
        self.connect_guard()
        self.dtypes = self.dtypes_in_use(module)
        if self.is_global_zero and self.spec.pipe > self.spec.micro_batches:
            print(
                f"strategy.micro_batches={self.spec.micro_batches} on {self.spec.pipe} pipe ranks: "
                f"{self.spec.bubble():.0%} of their time is bubble; more micro-batches make it less."
            )
        self.barrier()

    def spread(self, module: pl.LightningModule, device: torch.device) -> None:
        """Keep of the net what this rank owns, give it its first values, and split and shard it, a unit at a time."""
        plan = cast(ParallelPlan, module.plan)  # there is one: preflight has seen it
        net = module.get_submodule(plan.net)
        chain = plan.expand(fqn for fqn, _ in net.named_modules())
        self.spec.check_plan(plan, chain)
        in_module = f"{plan.net}." if plan.net else ""
        stages = self.cut(net, chain)
        stage_of = {in_module + unit: stage for stage, units in enumerate(stages) for unit in units}
        mine = {stage: units for stage, units in enumerate(stages) if self.pipe_rank_of(stage) == self.pipe_rank}
        if self.spec.pipe > 1:
            self.check_chain(net, chain)
            check_outside(module, in_module, stage_of, self.spec.name)
        found = find_ties(module, plan, stage_of, self.pipe_rank_of, tensor_ranks=self.spec.tensor)
        rework(blocks_of(module), compiled=self.run.compile, checkpointing=self.spec.activation_checkpointing)
        maker = Materializer(module, device, self.run.seed)
        inside = sequence_units(self.spec, self.run.stats, net, plan, chain)
        units = {unit: net.get_submodule(unit) for names in mine.values() for unit in names}
        for fqn in set(chain.modules) - units.keys():
            parent, _, child = fqn.rpartition(".")
            del net.get_submodule(parent)._modules[child]

        for fqn, unit in units.items():
            maker.make(in_module + fqn)
            if self.spec.tensor > 1:
                self.split(unit, fqn, plan, sequence=fqn in inside)
        maker.make()  # what lies outside of the chain
        norms = synchronize(module, self.data_group) if self.run.sync_batchnorm else {}
        if inside:
            tensor.bound_sequence(units, inside, plan, self.mesh["tensor"])
        if chain.modules[-1] in units:
            units[chain.modules[-1]].register_forward_hook(lambda _, __, output: tensor.plain_tree(output))
        self.ties = Ties(module, found, set(mine), self.pipe_group, self.pipe_rank_of)
        last = self.spec.num_stages - 1
        roots: dict[int, nn.Module] = {0: net}
        if self.spec.pipe > 1:
            roots = {
                stage: Stage({unit: units[unit] for unit in names}, is_first=stage == 0, is_last=stage == last)
                for stage, names in mine.items()
            }
        if self.spec.shards > 1:
            for stage, root in roots.items():
                self.shard(root, {unit: units[unit] for unit in mine[stage]}, chain)
        self.held_by = sharding.held_by(module) if self.spec.shards > 1 else {}
        self.reach = Reach(list(self.held_by), self.spec.name, self.data_group, device)
        if self.spec.pipe == 1:  # a pipeline's stages are called one after the other
            sharded = [fqn for fqn, part in module.named_modules() if isinstance(part, FSDPModule)]
            self.reach.follow(norms | {fqn: module.get_submodule(fqn) for fqn in sharded})
        if self.spec.pipe > 1:
            self.steps = self.pipelined(module, net, cast(dict[int, Stage], roots), device)

    def check_chain(self, net: nn.Module, chain: Chain) -> None:
        """ValueError where stages, which run the plan's chain, would compute something else than the net."""
        gap = self.run.stats.gap if self.run.stats else None
        places = [net.get_submodule(fqn) for fqn in chain.modules]
        listed = {fqn for fqn, part in net.named_modules(remove_duplicate=False) if part in places}
        if gap is None and listed != set(chain.modules):
            gap = f"{sorted(listed - set(chain.modules))[0]} is a module that stands in the plan already"
        if gap is not None:
            raise ValueError(
                f"strategy={self.spec.name}: the model's plan is not its net's forward: {gap}; make plan.stem, "
                f"blocks and head the whole chain (a ReLU between them can be a module of it), or choose strategy=fsdp."
            )

    def cut(self, net: nn.Module, chain: Chain) -> list[list[str]]:
        """The units of each stage."""
        stats = self.run.stats
        flops = [stats.forward_flops_by_unit[unit] if stats else 0 for unit in chain.modules]
        sizes = [sum(part.numel() for part in net.get_submodule(unit).parameters()) for unit in chain.modules]
        parts = cut(flops, sizes, self.spec.num_stages)
        return [[chain.modules[position] for position in part] for part in parts]

    def split(self, unit: nn.Module, fqn: str, plan: ParallelPlan, *, sequence: bool) -> None:
        mesh, loss_parallel = self.mesh["tensor"], self.spec.loss_parallel
        if not self.run.compile:
            draws = tensor.SplitDraws(mesh.get_local_rank(), torch.device(mesh.device_type))
            tensor.split_draws(unit, fqn, plan, draws, sequence=sequence)
        elif tensor.drops(unit):
            raise ValueError(
                f"compile=true: strategy={self.spec.name} splits {fqn}, whose dropout has to be drawn by each rank for "
                f"itself, which no compiled block can do; set compile=false, or its dropout to 0."
            )
        tensor.split_unit(unit, fqn, plan, mesh, sequence=sequence, loss_parallel=loss_parallel)

    def shard(self, root: nn.Module, units: Mapping[str, nn.Module], chain: Chain) -> None:
        hybrid = self.spec.replicas > 1
        sharding.shard(
            root,
            units,
            chain.blocks,
            self.mesh["replicate", "shard"] if hybrid else self.mesh["shard"],
            reshard_after_forward=self.spec.reshards,
            keep_last=self.spec.pipe == 1,
            reduce_dtype=getattr(torch, self.run.precision.reduce),
            offload=self.spec.cpu_offload,
        )

    def pipelined(
        self, module: pl.LightningModule, net: nn.Module, stages: dict[int, Stage], device: torch.device
    ) -> PipelinedSteps:
        link = Link(self.pipe_group, device, self.pipe_rank_of)
        return PipelinedSteps(
            module,
            net,
            Pipeline(
                stages,
                self.spec.num_stages,
                link,
                whole_backwards=self.spec.activation_checkpointing != "none",
            ),
            self.spec,
            self.data_group,
            self.guard.terms,
            seed=self.run.seed,
            forward_context=self.precision_plugin.forward_context,
        )

    def reads(self) -> Reads:
        return Reads(
            self.module,
            self.spec.name,
            is_part=lambda parameter: isinstance(parameter, DTensor),
            has_gradients=self.spec.tensor == self.spec.shards == 1,
            has_all=self.spec.pipe == 1,
            net=self.module.get_submodule(cast(ParallelPlan, self.module.plan).net),
        )

    # --- the step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning runs every micro-batch but a step's last in this context."""
        self.at_boundary = False
        self.set_all_reduce(False)
        try:
            yield
        finally:
            self.at_boundary = True
            self.set_all_reduce(True)

    def set_all_reduce(self, wanted: bool) -> None:
        """Hybrid sharding: replicas are averaged once per step; shards are reduced for every micro-batch."""
        if self.spec.replicas > 1 and self.spec.shards > 1 and self.steps is None:
            for part in sharding.sharded_parts(self.module):
                part.set_requires_all_reduce(wanted, recurse=False)

    def share_buffers(self) -> None:
        if self.spec.mesh.data_ranks > 1:
            share_buffers(self.module.buffers(), self.data_group)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.share_buffers()
        if self.is_first:
            self.forget_gradients()  # of a step that a module's own optimizer_step has not taken, or takes once more
        if self.steps is None:
            with self.reach.forward():
                return super().training_step(*args, **kwargs)
        if self.is_first:
            self.guard.begin()
        self.seed_by(*self.place(), "stages", self.pipe_rank)
        return self.steps.train(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.share_buffers()
        try:
            if self.steps is None:
                return super().validation_step(*args, **kwargs)
            with self.validation_draws():
                return self.steps.evaluate(self.module.validation_step, *args, **kwargs)
        finally:
            self.reshard()  # a hook may move weights, as a schedule-free optimizer's train() does

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self.share_buffers()
        if self.steps is None:
            return super().test_step(*args, **kwargs)
        return self.steps.evaluate(self.module.test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self.share_buffers()
        if self.steps is None:
            return super().predict_step(*args, **kwargs)
        return self.steps.evaluate(self.module.predict_step, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.steps is None or self.steps.last_unit is not None:  # others have it from there
            self.guard.add(closure_loss)
        if self.steps is None:
            if self.held_by:
                self.reach.watch(closure_loss, partial(sharding.gathered, self.held_by))
            closure_loss = super().backward(closure_loss, optimizer, *args, **kwargs)
            if self.held_by:
                self.reach.finish()
        else:  # the training step has been backward, too: only the hooks are left
            closure_loss = self.precision_plugin.pre_backward(closure_loss, self.module)
            closure_loss = self.precision_plugin.post_backward(closure_loss, self.module)
        if self.at_boundary:
            self.finish_gradients()
        return closure_loss

    def finish_gradients(self) -> None:
        """All that is left to communicate before the gradients of a step are those of the whole global batch."""
        if self.steps is not None:
            if self.held_by:
                self.reach.check(sharding.without_gradient(self.held_by))
            self.steps.reduce_gradients()
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        tensor.sum_partial_gradients(parameters)
        if self.spec.mesh.data_ranks > 1:
            loose = [parameter for parameter in parameters if not is_sharded(parameter)]
            average(loose, self.data_group, getattr(torch, self.run.precision.reduce))
        self.ties.sum_gradients()
        if self.spec.tensor > 1 and self.shards.is_first_step:
            named = self.module.named_parameters()
            tensor.check_alike(named, self.mesh["tensor"], self.run.precision.compute, self.spec.name)
        self.shards.take_gradients()

    def agreed_norm(self, optimizer: Optimizer) -> Tensor:
        return self.guard.agree(self.shards.square()).sqrt()

    def whole_norm(self, optimizer: Optimizer) -> Tensor:
        return self.shards.norm()

    def scale_to(self, max_norm: float, norm: Tensor, optimizer: Optimizer) -> None:
        self.shards.scale_to(max_norm, norm)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        self.shards.give_weights()
        self.forget_gradients()
        return result

    def forget_gradients(self) -> None:
        """Lightning zeroes what the optimizer has, and in a pipeline only when the next backward is over."""
        for parameter in [*self.module.parameters(), *self.shards.parts]:
            parameter.grad = None

    def teardown(self) -> None:
        self.contexts.close()
        # Not Lightning's own, which moves the module to the CPU: FSDP's units do not bear it while they are gathered.
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # --- what it shows ----------------------------------------------------------------------------------------------

    def dtypes_in_use(self, module: pl.LightningModule) -> dict[str, str]:
        return {
            "parameter": name(next(module.parameters()).dtype),
            "reduce": self.run.precision.reduce,
            "master": name(next((part.dtype for part in self.shards.stepped), next(module.parameters()).dtype)),
        }

    def gradient_norm(self) -> Tensor:
        return self.shards.norm()

    def reshard(self) -> None:
        for part in sharding.sharded_parts(self.module) + (self.steps.sharded_roots if self.steps else []):
            sharding.let_go(part)  # validation leaves the last unit gathered

    @property
    def stepping(self) -> Optimizer:
        return self.optimizers[0]

    def held(self) -> Iterator[Held]:
        """What a checkpoint is made of: the parts that this rank has, each written by one of those that have it."""
        self.reshard()
        for fqn, part in [*self.module.named_parameters(), *persistent_buffers(self.module)]:
            box = self.shards.box_of(part)
            if box is not None:
                yield Held(
                    name=self.ties.owner_of.get(fqn, fqn),
                    shape=tuple(part.shape),
                    boxes=[box],
                    stepped=self.shards.stepped_for(part),
                    writes=part not in self.ties.duplicates and self.is_first_holder(part),
                )

    def is_first_holder(self, part: Tensor) -> bool:
        """Whether this rank is the first of those data and tensor ranks that hold the same part."""
        split: set[str] = set()
        if isinstance(part, DTensor):
            names = part.device_mesh.mesh_dim_names or ()
            placed = zip(names, part.placements, strict=True)
            split = {axis for axis, placement in placed if not placement.is_replicate()}
        others = {"replicate", "shard", "tensor"} - split
        return all(self.mesh.get_local_rank(axis) == 0 for axis in others)

    def narrow(self) -> None:
        narrow(self.precision_plugin)
        self.shards.give_weights()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        self.reshard()
        for fqn, parameter in self.module.named_parameters():
            weight = tensor.whole(parameter.detach())
            yield self.ties.owner_of.get(fqn, fqn), weight.cpu()


def sequence_units(
    spec: Grid, stats: ModelStats | None, net: nn.Module, plan: ParallelPlan, chain: Chain
) -> Sequence[str]:
    """Units whose activations are split along the sequence; none without tensor ranks, or a plan that allows it."""
    if spec.tensor == 1 or not spec.sequence_parallel or not tensor.covers_blocks(net, plan, chain):
        return ()
    if stats and stats.gap:
        return ()  # what the net does between its units might want the whole sequence
    return tensor.sequence_units(plan, chain)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP has it, and averages its gradient."""
    return isinstance(parameter, DTensor) and "shard" in (parameter.device_mesh.mesh_dim_names or ())


def check_module(module: pl.LightningModule, spec: Grid) -> None:
    """ValueError for what the engine would leave out without a word, or cannot split."""
    kind = type(module).__name__
    check_copies(module, spec.name)
    if not module.automatic_optimization:
        raise ValueError(
            f"strategy={spec.name} steps shards by itself, and {kind} optimizes manually; set "
            f"automatic_optimization=True, or choose strategy=ddp."
        )
    if spec.pipe > 1 and is_overridden("backward", module, pl.LightningModule):
        raise ValueError(
            f"strategy={spec.name} runs backward stage by stage and would ignore {kind}.backward; leave it out, or "
            f"choose strategy=fsdp."
        )
    if is_overridden("optimizer_zero_grad", module, pl.LightningModule):
        # What it keeps would not be kept; and in a pipeline it is called when gradients have been made already.
        raise ValueError(
            f"strategy={spec.name} lets go of gradients by itself, whatever {kind}.optimizer_zero_grad does; leave it "
            f"out, or choose strategy=ddp."
        )
    ranks_differ = spec.pipe > 1 or spec.tensor > 1 or spec.shards > 1
    if ranks_differ and is_overridden("configure_gradient_clipping", module, pl.LightningModule):
        raise ValueError(
            f"strategy={spec.name} clips by the norm over all ranks, and {kind}.configure_gradient_clipping by "
            f"that of what one rank holds; leave it out (trainer.clip_norm clips by the global norm), or choose "
            f"strategy=ddp."
        )
    if spec.tensor > 1:
        plan = cast(ParallelPlan, module.plan)
        tensor.check_split(module.get_submodule(plan.net), plan, spec.tensor)


def check_outside(module: pl.LightningModule, in_net: str, stage_of: Mapping[str, int], strategy: str) -> None:
    """ValueError if a parameter, or a module of the net, belongs to no unit: no stage would have it, or all."""
    parts = [f"parameter {fqn}" for fqn, _ in module.named_parameters() if not is_inside(fqn, stage_of)]
    parts += [
        f"module {fqn} ({type(part).__name__})"
        for fqn, part in module.named_modules()
        if fqn.startswith(in_net) and not list(part.children()) and not is_inside(fqn, stage_of)
    ]
    if parts:
        raise ValueError(
            f"strategy={strategy}: {parts[0]} lies outside of the chain that the model's plan lists; put it into a "
            f"module of plan.stem, blocks or head, or choose strategy=fsdp."
        )


def is_inside(fqn: str, units: Iterable[str]) -> bool:
    return any(fqn == unit or fqn.startswith(f"{unit}.") for unit in units)
