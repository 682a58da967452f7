"""Lightning strategies that hold the whole model: one process, and DDP."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from strategies.engines.averaging import AveragesExactly
from strategies.engines.blocks import blocks_of, rework
from strategies.engines.checkpoint import Held, persistent_buffers
from strategies.engines.materialize import materialize
from strategies.engines.precision import masters_of, name, narrow, precision_plugin
from strategies.spec import Run


class WholeModel(Strategy):
    """What holds for every strategy whose ranks each keep all of the model; mixed into a Lightning strategy."""

    run: Run
    checkpointing: str
    dtypes: dict[str, str]

    def setup(self, trainer: pl.Trainer) -> None:
        materialize(self.module, self.root_device, self.run.seed)
        rework(blocks_of(self.module), compiled=self.run.compile, checkpointing=self.checkpointing)
        super().setup(trainer)
        parameter = next(self.module.parameters()).dtype
        master = self.optimizers[0].param_groups[0]["params"][0].dtype if self.optimizers else parameter
        # A gradient is reduced in the format that it has.
        self.dtypes = {"parameter": name(parameter), "reduce": name(parameter), "master": name(master)}

    @property
    def module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def gradient_norm(self) -> Tensor:
        # DDP has averaged the gradients by now, so every rank's own norm is the norm of the whole.
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        # Squares of bfloat16 gradients are not summed in bfloat16.
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        return torch.linalg.vector_norm(torch.stack(norms))

    def held(self) -> Iterator[Held]:
        """What a checkpoint is made of: all of it is on every rank, which write a part each."""
        rank, world_size = self.module.trainer.global_rank, self.module.trainer.world_size
        masters = masters_of(self.precision_plugin)
        named = [(fqn, masters.get(parameter, parameter)) for fqn, parameter in self.module.named_parameters()]
        for number, (fqn, tensor) in enumerate([*named, *persistent_buffers(self.module)]):
            yield Held.whole(fqn, tensor, writes=number % world_size == rank)

    @property
    def stepping(self) -> Optimizer:
        return self.optimizers[0]

    def narrow(self) -> None:
        narrow(self.precision_plugin)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for fqn, parameter in self.module.named_parameters():
            yield fqn, parameter.detach().cpu()


class SingleEngine(WholeModel, SingleDeviceStrategy):
    """One process, one device."""

    def __init__(self, run: Run, *, checkpointing: str) -> None:
        device = torch.device("cuda", 0) if run.on_gpu else torch.device("cpu")
        super().__init__(device=device, precision_plugin=precision_plugin(run.precision, device.type))
        self.run, self.checkpointing = run, checkpointing

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}


class DDPEngine(WholeModel, AveragesExactly):
    """The model on every rank; DistributedDataParallel averages the gradients."""

    def __init__(self, run: Run, *, bucket_mb: int, checkpointing: str) -> None:
        super().__init__(
            precision_plugin=precision_plugin(run.precision, "cuda" if run.on_gpu else "cpu"),
            process_group_backend="nccl" if run.on_gpu else "gloo",
            timeout=timedelta(seconds=run.timeout_s),
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,  # gradients live in the buckets: one copy of them less
        )
        self.run, self.checkpointing = run, checkpointing
