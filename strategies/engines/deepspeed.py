"""ZeRO through DeepSpeed's engine, as a Lightning strategy that works on CPU with gloo as on GPUs with NCCL."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.boxes import Box, boxes_of_range
from strategies.checkpoint import LossScale
from strategies.engines.averaging import AveragesExactly, share_buffers
from strategies.engines.batch_norm import synchronize
from strategies.engines.blocks import blocks_of, chain_of, rework
from strategies.engines.checkpoint import Held, persistent_buffers
from strategies.engines.finite import GRADIENTS, StepGuard, leave_out_when
from strategies.engines.groups import counting_once
from strategies.engines.materialize import materialize
from strategies.engines.micro_batches import MicroBatches
from strategies.engines.own_code import Reads, check_copies
from strategies.engines.precision import KeepsBuffers, LossScaler, autocast_inside, name
from strategies.engines.probing import check_modes, scope_of
from strategies.engines.reach import Reach
from strategies.engines.shards import whole_parameter
from strategies.spec import Run

if TYPE_CHECKING:
    from strategies.zero import Zero


class ZeroPrecision(KeepsBuffers, DeepSpeedPrecision):
    """Lightning's plugin, but for how a net is built, and what of it is narrowed."""


class ZeroEngine(MicroBatches, AveragesExactly, DeepSpeedStrategy):
    """DeepSpeed's ZeRO engine around the LightningModule.

    Differs from Lightning's own strategy in that it also runs on CPU, that gradients are scaled once under
    accumulation, that nets are initialised as every other strategy initialises them, and that its optimizer step falls
    where other strategies have theirs: once per global batch.
    """

    def __init__(self, spec: Zero, run: Run) -> None:
        import_deepspeed(on_gpu=run.on_gpu)
        super().__init__(
            config={},  # made in setup(), when the model's size is known
            precision_plugin=ZeroPrecision("bf16-true" if run.precision.parameter == "bfloat16" else "32-true"),
            process_group_backend="nccl" if run.on_gpu else "gloo",
            timeout=timedelta(seconds=run.timeout_s),
            logging_level=logging.ERROR,  # it warns of every optimizer that is not its own
        )
        self.spec, self.run, self.guard = spec, run, StepGuard()
        self.at_boundary = True  # whether the next backward is its step's last
        self.is_reduced = False  # whether such a backward has been
        self.unreached: list[tuple[Tensor, Tensor]] = []  # what a step may not change, and what it was before
        self.leaves_out = False  # whether DeepSpeed is to leave out the step under way
        self.scaler = LossScaler() if run.precision.compute == "float16" else None

    @property
    def module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # --- processes -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # Lightning's refuses everything but CUDA

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    # --- the model -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self.module
        self.spec.check_module(module, self.run)  # again: a module's own setup() may have changed it
        self.precision_plugin.convert_module(module)  # in place
        self.nvme = self.nvme_folder(trainer)
        self.config = self.spec.deepspeed_config(
            [parameter.numel() for parameter in module.parameters()],
            precision=self.run.precision,
            accumulation=trainer.accumulate_grad_batches,
            micro_batch_size=self.run.micro_batch_size,
            clip_norm=trainer.gradient_clip_val,
            blocks=leaf_blocks(module),
            nvme=self.nvme,
            on_gpu=self.run.on_gpu,
            compiled=self.run.compile,
        )
        if self.is_global_zero:
            (Path(trainer.default_root_dir) / "deepspeed.json").write_text(json.dumps(self.config, indent=2) + "\n")
        self.make(module)
        if self.run.precision.autocasts:
            autocast_inside(module, self.root_device.type, getattr(torch, self.run.precision.compute))
        broadcast_buffers(module)
        norms = synchronize(module, None) if self.run.sync_batchnorm else {}
        rework(blocks_of(module), compiled=self.run.compile, checkpointing=self.spec.activation_checkpointing)
        if self.spec.stage == 3:
            for fqn in leaf_blocks(module):
                module.get_submodule(fqn).register_forward_pre_hook(with_gradient)
        self.start_engine(module)
        self.reach.follow(norms | (gathered_at_once(module) if self.spec.stage == 3 else {}))
        self.setup_precision_plugin()
        self.dtypes = self.dtypes_in_use()
        self.barrier()

    def make(self, module: nn.Module) -> None:
        """Give the net its first weights; under stage 3 no rank ever holds more of it whole than one module."""
        if self.spec.stage < 3:
            materialize(module, self.root_device, self.run.seed)
            return
        import deepspeed

        # A module, though an empty one: only then is zero_optimization.memory_efficient_linear heeded.
        shards = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=self.config)
        materialize(
            module,
            self.root_device,
            self.run.seed,
            after=lambda made: convert(shards, list(made.parameters(recurse=False))),
        )
        # DeepSpeed moves no net that is sharded already: buffers that were not on meta are still where they were made.
        for part in module.modules():
            for key, buffer in part.named_buffers(recurse=False):
                part._buffers[key] = buffer.to(self.root_device)

    def nvme_folder(self, trainer: pl.Trainer) -> Path:
        """A folder of this run's own on the disk that the user has named, or else beside its other files."""
        run_dir = Path(trainer.default_root_dir)
        chosen = self.spec.offload.nvme_path
        # Run folders of a sweep are called 0, 1, 2: with the sweep's own name they are told apart.
        return run_dir / "nvme" if chosen is None else Path(chosen) / f"{run_dir.parent.name}-{run_dir.name}"

    def start_engine(self, module: pl.LightningModule) -> None:
        import deepspeed

        with shapes_shown(module) if self.spec.stage == 3 else nullcontext():
            optimizers, self.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(module)
        if len(optimizers) != 1:
            raise ValueError(
                f"strategy={self.spec.name} takes one optimizer, {type(module).__name__}.configure_optimizers gives "
                f"{len(optimizers)}; give one, or choose strategy=ddp."
            )
        self.check_scope(optimizers[0])
        self.leaves = {fqn: parameter for fqn, parameter in module.named_parameters() if parameter.requires_grad}
        self.reach = Reach(list(self.leaves), self.spec.name, None, self.root_device)
        with not_broadcast(module.parameters()):
            engine, optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizers[0],
                model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
                config=self.config,
                dist_init_required=False,
            )
        engine.set_gradient_accumulation_boundary(True)
        if self.scaler:
            optimizer.override_loss_scale(self.scaler.value)
        self.model, self.optimizers = engine, [optimizer]
        leave_out_when(lambda: self.leaves_out, optimizer)
        if self.spec.stage == 3:  # which calls the optimizer once for each part of its groups
            parts = optimizer.sub_group_to_group_id
            optimizer._optimizer_step = counting_once(optimizer._optimizer_step, optimizer.optimizer, parts)

    def reads(self) -> Reads:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        def is_part(parameter: Any) -> bool:
            return self.spec.stage == 3 and parameter.ds_status is not ZeroParamStatus.AVAILABLE

        return Reads(self.module, self.spec.name, is_part=is_part, has_gradients=False, has_all=True)

    def check_scope(self, optimizer: Optimizer) -> None:
        """ValueError if the optimizer looks at more than one element at a time: it steps flat parts of the model."""
        check_modes(optimizer, f"strategy={self.spec.name}")
        num_dims = [
            [len(getattr(one, "ds_shape", one.shape)) for one in group["params"]] for group in optimizer.param_groups
        ]
        if self.world_size > 1 and scope_of(optimizer, num_dims, self.root_device) != "element":
            raise whole_parameter(type(optimizer), self.spec.name)

    # --- the step --------------------------------------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False  # Lightning says which micro-batch is the last, and steps after that one only

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning runs every micro-batch but a step's last in this context."""
        self.at_boundary = False
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.at_boundary = True
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.reach.forward():
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.at_boundary and self.is_reduced:
            raise ValueError(
                f"strategy={self.spec.name}: a second backward before the optimizer's step would count as a step "
                f"of its own; add the losses up and call backward once, or choose strategy=ddp."
            )
        self.is_reduced = self.at_boundary
        self.guard.add(closure_loss)
        self.reach.watch(closure_loss, lambda: self.leaves)
        # Lightning has divided the loss by the accumulation already; DeepSpeed would do it once more.
        result = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        self.reach.finish()
        if self.spec.stage == 3 and self.spec.activation_checkpointing != "none":
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            # A forward that runs again ends inside a module, which is then left on this stack for good.
            del FWD_MODULE_STACK[1:]
        return result

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        engine_optimizer = self.deepspeed_engine.optimizer
        result = super().optimizer_step(optimizer, partial(self.checked, closure), *args, **kwargs)
        for tensor, before in self.unreached:
            tensor.copy_(before)
        self.unreached = []
        self.is_reduced = False
        engine_optimizer.custom_loss_scaler = self.scaler is not None  # `checked` may have set another for this step
        if self.scaler:
            engine_optimizer.override_loss_scale(self.scaler.after(overflow=bool(engine_optimizer.overflow)))
        elif engine_optimizer.overflow and not self.leaves_out:
            # DeepSpeed, which looks at the gradients by itself, has left the step out without a word.
            self.guard.problem = GRADIENTS
            self.guard.passes(self.module.trainer)
        return result

    def checked(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self.unreached = [(tensor, tensor.clone()) for tensor in self.unreached_tensors()]
        if self.module.automatic_optimization:
            self.guard.agree(torch.zeros((), device=self.root_device))
            self.leaves_out = not self.guard.passes(self.module.trainer)
            if self.loss_factor != 1.0:
                # DeepSpeed divides gradients, and their norm before it clips them, by the scale of the loss.
                optimizer = self.deepspeed_engine.optimizer
                optimizer.override_loss_scale(optimizer.loss_scale / self.loss_factor)
        return result

    def unreached_tensors(self) -> Iterator[Tensor]:
        """All that is kept of parameters that no loss reaches: DeepSpeed steps them, by gradients of zeros."""
        for fqn in self.reach.unused:
            parameter: Any = self.leaves[fqn]
            if self.spec.extensions:
                raise ValueError(
                    f"strategy={self.spec.name}: no loss reaches parameter {fqn}, and its weights on the disk would "
                    f"decay; freeze it (requires_grad_(False)), or choose strategy=zero3."
                )
            yield parameter.data
            if self.spec.stage == 3:
                yield parameter.ds_tensor.data
            share = self.share_of(parameter) if self.spec.stage == 3 else self.fragment_of(parameter)
            if share is not None:
                yield share.flat.detach().narrow(0, share.start, share.numel)

    def teardown(self) -> None:
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return  # a start that failed before the net was made: Lightning would try to move it, and hide the cause
        super().teardown()
        # While the process group lives: ZeRO-3 that is left to the interpreter's exit may abort.
        if self.model is not self.lightning_module:  # it may be a failed start that is cleared away
            self.deepspeed_engine.destroy()
            if self.spec.extensions:
                self.sweep_nvme()

    def sweep_nvme(self) -> None:
        """Remove what this rank has on the disk, and the folders that are empty then; other ranks do so meanwhile."""
        for folder, _, _ in os.walk(self.nvme, topdown=False):  # passes over what is gone
            if Path(folder).name == f"rank{self.global_rank}":
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another rank's files are still there, or it was faster
                Path(folder).rmdir()

    # --- what it shows ---------------------------------------------------------------------------------------------

    def dtypes_in_use(self) -> dict[str, str]:
        optimizer = self.deepspeed_engine.optimizer
        masters = (
            optimizer.single_partition_of_fp32_groups if self.spec.stage < 3 else optimizer.fp32_partitioned_groups_flat
        )
        return {
            "parameter": name(next(self.module.parameters()).dtype),
            "reduce": name(optimizer.communication_data_type),
            "master": name(masters[0].dtype),
        }

    def gradient_norm(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        optimizer = self.deepspeed_engine.optimizer
        if self.spec.stage < 3:
            optimizer._wait_for_offload_copies()
            scaled = optimizer.scaled_global_norm()
        else:
            scaled = combine_grad_norm_groups(optimizer._get_norm_groups())
        return torch.as_tensor(scaled / optimizer.loss_scale)

    @property
    def stepping(self) -> Optimizer:
        return self.deepspeed_engine.optimizer.optimizer

    def held(self) -> Iterator[Held]:
        """What a checkpoint is made of: this rank's share of each parameter, in the format that is stepped."""
        for fqn, buffer in persistent_buffers(self.module):
            yield Held.whole(fqn, buffer, writes=self.is_global_zero)
        parameters: Iterator[tuple[str, Any]] = self.module.named_parameters()
        for fqn, parameter in parameters:
            found = self.share_of(parameter) if self.spec.stage == 3 else self.fragment_of(parameter)
            if found is None:
                continue
            shape = tuple(parameter.ds_shape if self.spec.stage == 3 else parameter.shape)
            boxes = boxes_of_range(found.first, found.first + found.numel, shape)
            is_copy = self.spec.stage < 3 and not parameter.requires_grad  # every rank has all of what is frozen
            yield Held(
                name=fqn,
                shape=shape,
                boxes=boxes,
                stepped=found.flat,
                select=found.views(boxes),
                has_state=fqn not in self.reach.unused,  # DeepSpeed counts its steps with those of all others
                writes=self.is_global_zero or not is_copy,
            )

    def fragment_of(self, parameter: Any) -> Share | None:
        """Stages 1 and 2 cut a flat tensor of all parameters; None of those that have none of this rank's cut."""
        if not parameter.requires_grad:
            return Share(parameter.data.view(-1), 0, 0, parameter.numel())
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self.deepspeed_engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Share(flat, here.start, there.start, there.numel)

    def share_of(self, parameter: Any) -> Share | None:
        """Stage 3 cuts each parameter by itself, padded so that all ranks have as much."""
        optimizer, size = self.deepspeed_engine.optimizer, parameter.ds_tensor.ds_numel
        first = self.global_rank * size
        count = min(size, parameter.ds_numel - first)
        if count <= 0:
            return None
        if not parameter.requires_grad:
            return Share(parameter.ds_tensor.data.view(-1), 0, first, count)
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return Share(optimizer.fp32_partitioned_groups_flat[group], offset, first, count)

    @property
    def scaling(self) -> LossScale | None:
        return self.scaler.state if self.scaler else None

    @scaling.setter
    def scaling(self, saved: LossScale) -> None:
        assert self.scaler is not None
        self.scaler.state = saved
        self.deepspeed_engine.optimizer.override_loss_scale(saved.value)

    def narrow(self) -> None:
        optimizer = self.deepspeed_engine.optimizer
        if self.spec.stage < 3:
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()  # nothing may be gathered while shards change
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()

    def restored(self, without_state: frozenset[str]) -> None:
        self.reach.untouched = without_state & self.leaves.keys()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        if self.spec.stage == 3:
            self.deepspeed_engine.empty_partition_cache()  # a forward alone prefetches for a backward that never came
        for fqn, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.spec.stage == 3):
                weight = parameter.detach().cpu().clone()
            yield fqn, weight


class Share(NamedTuple):
    """Where this rank keeps its elements of one parameter."""

    flat: Tensor  # what the optimizer steps
    start: int  # in `flat`
    first: int  # of the flattened parameter
    numel: int

    def views(self, boxes: Sequence[Box]) -> Callable[[Tensor], Sequence[Tensor]]:
        """Views of these boxes in anything of the layout of `flat`."""

        def select(like_flat: Tensor) -> Sequence[Tensor]:
            parts = like_flat.narrow(0, self.start, self.numel).split([box.numel for box in boxes])
            return [part.view(box.shape) for part, box in zip(parts, boxes, strict=True)]

        return select


def leaf_blocks(module: pl.LightningModule) -> list[str]:
    """FQNs of the plan's blocks that DeepSpeed may gather and reduce as one; none where there is no plan.

    It reduces a block when the gradient of the block's input is there. So a block must have something trainable before
    it (else torch has no such gradient, and reports it at once), and share no parameter with another module, whose
    gradient would come later and be lost.
    """
    chain = chain_of(module)
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    found, trainable_before = [], False
    for fqn in chain.modules:
        part = module.get_submodule(fqn)
        inside = Counter(id(parameter) for _, parameter in part.named_parameters(remove_duplicate=False))
        if fqn in chain.blocks and trainable_before and all(uses[key] == count for key, count in inside.items()):
            found.append(fqn)
        trainable_before |= any(parameter.requires_grad for parameter in part.parameters())
    return found


def with_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Inputs of a block that DeepSpeed gathers at once, one of them such that backward comes by.

    The plan's order need not be the net's: the first block of a second tower is called with data, none of which needs a
    gradient.
    """
    floats = [one for one in inputs if isinstance(one, Tensor) and one.is_floating_point()]
    if not torch.is_grad_enabled() or not floats or any(one.requires_grad for one in floats):
        return None
    return tuple(one.detach().requires_grad_() if one is floats[0] else one for one in inputs)


def gathered_at_once(module: pl.LightningModule) -> dict[str, nn.Module]:
    """Modules of which DeepSpeed gathers the weights before it calls them, by FQN: blocks, and what lies outside."""
    blocks = set(leaf_blocks(module))
    inside = tuple(f"{block}." for block in blocks)
    return {
        fqn: part
        for fqn, part in module.named_modules()
        if fqn in blocks or (list(part.parameters(recurse=False)) and not fqn.startswith(inside))
    }


def check_module(module: pl.LightningModule, strategy: str, stage: int) -> None:
    """ValueError for what DeepSpeed would leave out without a word, or stumble over."""
    kind = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"strategy={strategy}: DeepSpeed steps one optimizer once per global batch, and {kind} optimizes manually; "
            f"set automatic_optimization=True, or choose strategy=ddp."
        )
    if stage == 3:
        check_copies(module, strategy)
    for hook in ("configure_gradient_clipping", "backward", "optimizer_zero_grad"):
        if is_overridden(hook, module, pl.LightningModule):
            raise ValueError(
                f"strategy={strategy}: DeepSpeed clips, runs backward and zeroes gradients itself and would ignore "
                f"{kind}.{hook}; leave it out (trainer.clip_norm clips by the global norm), or choose strategy=ddp."
            )


# DeepSpeed (0.19) broadcasts a parameter as bytes, as which torch views nothing that has no dims.


@contextmanager
def not_broadcast(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters without dims are left out: all ranks have given them the same value."""
    scalars: list[Any] = [parameter for parameter in parameters if parameter.dim() == 0]
    for scalar in scalars:
        scalar.ds_optim_param = True  # DeepSpeed's own mark for what differs between ranks
    yield
    for scalar in scalars:
        del scalar.ds_optim_param


def convert(shards: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Have stage 3 hold the parameters of one module in parts; those without dims have one on the way."""
    scalars: list[Any] = [parameter for parameter in parameters if parameter.dim() == 0]
    for scalar in scalars:
        scalar.data = scalar.data.reshape(1)
    shards._convert_to_zero_parameters(parameters)
    for scalar in scalars:
        scalar.ds_shape = torch.Size([])  # in which it is gathered


def check_compiled(module: pl.LightningModule, strategy: str) -> None:
    """ValueError for a block inside of which DeepSpeed's hooks gather weights: torch.compile cannot trace them."""
    apart = set(chain_of(module).blocks) - set(leaf_blocks(module))
    if apart:
        raise ValueError(
            f"compile=true: strategy={strategy} cannot gather {type(module).__name__}'s block {min(apart)} at once: it "
            f"shares a parameter or has nothing trainable before it; set compile=false, or choose strategy=zero2."
        )


def broadcast_buffers(module: nn.Module) -> None:
    """Before every forward the buffers of rank 0 go to all, as under DDP: statistics of a BatchNorm are one rank's."""
    module.register_forward_pre_hook(lambda *_: share_buffers(module.buffers()))


def import_deepspeed(*, on_gpu: bool) -> None:
    """Import DeepSpeed for the device at hand, without what it would build or compile in vain."""
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"  # read at the first import
    from deepspeed.runtime import compiler

    if not on_gpu:
        # An all-reduce over shared memory that takes a minute to build; gloo's is as fast here.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed imports its Muon optimizer to see whether ours is one; compiling that one's kernels takes seconds.
    compiler.compile, kept = lambda: lambda function: function, compiler.compile
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = kept


@contextmanager
def shapes_shown(module: nn.Module) -> Iterator[None]:
    """Sharded parameters show the shapes of the whole, without its memory: an optimizer may group them by shape."""
    sharded: list[Any] = list(module.parameters())
    held = [parameter.data for parameter in sharded]
    for parameter in sharded:
        parameter.data = parameter.new_empty(()).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in zip(sharded, held, strict=True):
            parameter.data = data
