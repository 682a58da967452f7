"""Lightning strategies that hold the whole model: one process, and DDP."""

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from strategies.checkpoint import LossScale
from strategies.engines.averaging import AveragesExactly, send, unsent
from strategies.engines.batch_norm import synchronize
from strategies.engines.blocks import blocks_of, rework
from strategies.engines.checking import ChecksSteps, stepped_by
from strategies.engines.checkpoint import Held, persistent_buffers
from strategies.engines.finite import StepGuard
from strategies.engines.materialize import materialize
from strategies.engines.precision import (
    loss_scale_of,
    masters_of,
    names,
    narrow,
    precision_plugin,
    set_loss_scale,
)
from strategies.engines.reach import Reach
from strategies.spec import Run


class WholeModel(ChecksSteps):
    """What holds for every strategy whose ranks each keep all of the model; mixed into a Lightning strategy."""

    run: Run
    checkpointing: str
    dtypes: dict[str, str]
    reach: Reach | None = None  # where ranks have to call the same modules

    def setup(self, trainer: pl.Trainer) -> None:
        self.precision_plugin.convert_module(self.module)  # in place
        materialize(self.module, self.root_device, self.run.seed)
        if self.run.sync_batchnorm and dist.is_initialized():
            way_out = "would be mixed up. Have all samples go the same way, or set trainer.sync_batchnorm=false."
            self.reach = Reach([], "ddp", None, self.root_device, way_out)
            self.reach.follow(synchronize(self.module, None))
        rework(blocks_of(self.module), compiled=self.run.compile, checkpointing=self.checkpointing)
        super().setup(trainer)
        self.connect_guard()
        parameters = names(self.module.parameters())
        stepped = [part for optimizer in self.optimizers for part in stepped_by(optimizer)]
        # A gradient is reduced in the format that it has.
        self.dtypes = {"parameter": parameters, "reduce": parameters, "master": names(stepped) or parameters}

    @property
    def module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.reach is None else self.reach.forward():
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.module.automatic_optimization:
            self.guard.add(closure_loss)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def whole_norm(self, optimizer: Optimizer) -> Tensor:
        parameters = self.precision_plugin.main_params(optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return get_total_norm(gradients).to(self.root_device)

    def agreed_norm(self, optimizer: Optimizer) -> Tensor:
        norm = self.whole_norm(optimizer)
        # Of scaled gradients, the scaler leaves out those that overflow, and lowers its scale.
        self.guard.agree(norm if self.run.precision.compute != "float16" else torch.zeros_like(norm))
        return norm

    def scale_to(self, max_norm: float, norm: Tensor, optimizer: Optimizer) -> None:
        clip_grads_with_norm_(self.precision_plugin.main_params(optimizer), max_norm, norm)

    def gradient_norm(self) -> Tensor:
        # DDP has averaged the gradients by now, so every rank's own norm is the norm of the whole.
        masters = masters_of(self.precision_plugin)
        stepping = self.optimizers if self.manual is None else [self.manual]
        stepped = {id(part) for optimizer in stepping for part in stepped_by(optimizer)}
        trained = [one for one in self.module.parameters() if id(masters.get(one, one)) in stepped]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        # Squares of bfloat16 gradients are not summed in bfloat16.
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.root_device)

    def held(self) -> Iterator[Held]:
        """What a checkpoint is made of: all of it is on every rank, which write a part each."""
        rank, world_size = self.module.trainer.global_rank, self.module.trainer.world_size
        masters = masters_of(self.precision_plugin)
        named = [(fqn, masters.get(parameter, parameter)) for fqn, parameter in self.module.named_parameters()]
        for number, (fqn, tensor) in enumerate(named):
            yield Held.whole(fqn, tensor, writes=number % world_size == rank)
        for fqn, buffer in persistent_buffers(self.module):
            yield Held.whole(fqn, buffer, writes=rank == 0)  # the first rank's are everybody's in the next forward

    @property
    def stepping(self) -> Optimizer:
        return self.optimizers[0]

    def narrow(self) -> None:
        narrow(self.precision_plugin)

    @property
    def scaling(self) -> LossScale | None:
        return loss_scale_of(self.precision_plugin)

    @scaling.setter
    def scaling(self, saved: LossScale) -> None:
        set_loss_scale(self.precision_plugin, saved)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for fqn, parameter in self.module.named_parameters():
            yield fqn, parameter.detach().cpu()


class SingleEngine(WholeModel, SingleDeviceStrategy):
    """One process, one device."""

    def __init__(self, run: Run, *, checkpointing: str) -> None:
        device = torch.device("cuda", 0) if run.on_gpu else torch.device("cpu")
        super().__init__(device=device, precision_plugin=precision_plugin(run.precision, device.type))
        self.run, self.checkpointing, self.guard = run, checkpointing, StepGuard()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}


class DDPEngine(WholeModel, AveragesExactly):
    """The model on every rank; DistributedDataParallel averages the gradients."""

    def __init__(self, run: Run, *, bucket_mb: int, find_unused_parameters: bool, checkpointing: str) -> None:
        super().__init__(
            precision_plugin=precision_plugin(run.precision, "cuda" if run.on_gpu else "cpu"),
            process_group_backend="nccl" if run.on_gpu else "gloo",
            timeout=timedelta(seconds=run.timeout_s),
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,  # gradients live in the buckets: one copy of them less
            find_unused_parameters=find_unused_parameters,
        )
        self.finds_unused = find_unused_parameters
        self.run, self.checkpointing, self.guard = run, checkpointing, StepGuard()

    def configure_ddp(self) -> None:
        module = self.module
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, unsent(module))
        super().configure_ddp()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for fqn in unsent(self.module):  # those of other formats are sent by DDP
            send(self.module.get_buffer(fqn))
        return super().training_step(*args, **kwargs)

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        self.at_start = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if trainer.state.fn == TrainerFn.FITTING and not self.finds_unused:  # else DDP keeps to its first buckets
            self.settle_buckets()

    def settle_buckets(self) -> None:
        """Have DDP choose its buckets before the first step, by a backward of zeros; collective.

        Left alone it chooses them anew after its first one. A run that goes on would then add gradients up in another
        order in its first step than the run that was not interrupted, and differ from it in the last bit.
        """
        model = cast(DistributedDataParallel, self.model)
        model.reducer.prepare_for_backward([])
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.stack([parameter.sum() * 0.0 for parameter in trainable]).sum().backward()
        for parameter in trainable:
            parameter.grad = None

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        result = super().backward(closure_loss, optimizer, *args, **kwargs)
        model = cast(DistributedDataParallel, self.model)
        if model.require_backward_grad_sync:
            self.check_reached(model)
        return result

    def check_reached(self, model: DistributedDataParallel) -> None:
        """ValueError on a rank that lacks a gradient, for which DDP on the others waits."""
        try:
            model._check_reducer_finalized()
        except RuntimeError:
            trained = {id(parameter) for parameter in self.at_start}
            named = self.module.named_parameters()
            missed = (fqn for fqn, parameter in named if id(parameter) in trained and parameter.grad is None)
            what = next((f"parameter {fqn}" for fqn in missed), "all that an earlier backward did")
            raise ValueError(
                f"strategy=ddp: the loss of rank {self.global_rank} does not reach {what}; set "
                f"strategy.find_unused_parameters=true, or freeze what nothing uses (requires_grad_(False))."
            ) from None
