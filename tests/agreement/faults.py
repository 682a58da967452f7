"""Faults that distributed training really has, planted as callbacks: each must make verify say "disagrees"."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def gradients(module: pl.LightningModule) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


class AveragedTwice(pl.Callback):
    """Gradients divided by the number of ranks once more than they should be."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for gradient in gradients(pl_module):
            gradient.div_(trainer.world_size)


class AccumulatedTwice(pl.Callback):
    """Gradients divided by the number of micro-batches once more (Lightning's DeepSpeed strategy has done it)."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for gradient in gradients(pl_module):
            gradient.div_(trainer.accumulate_grad_batches)


class DeepSpeedScalesAgain(pl.Callback):
    """DeepSpeed divides the gradients by the accumulation after Lightning has divided the loss by it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine: Any = trainer.strategy.model
        backward = engine.backward
        engine.backward = lambda loss, scale_wrt_gas: backward(loss, scale_wrt_gas=True)


class Summed(pl.Callback):
    """DeepSpeed adds the ranks' gradients up and does not divide them by their number."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer: Any = trainer.strategy.model.optimizer  # type: ignore[union-attr]
        optimizer.gradient_average = False
        optimizer.gradient_predivide_factor = trainer.world_size  # what stage 3 reads


class ShardNotStepped(pl.Callback):
    """The last rank's part of the weights is never updated."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            optimizer: Any = trainer.strategy.model.optimizer  # type: ignore[union-attr]
            optimizer._optimizer_step = lambda group: None


class NotAveraged(pl.Callback):
    """Every rank steps with its own gradient."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ddp = trainer.strategy.model
        assert isinstance(ddp, DistributedDataParallel)
        ddp.require_backward_grad_sync = False


class ClippedByLocalNorm(NotAveraged):
    """Every rank clips its own gradient by its own norm, and only then are they averaged."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.clip_norm, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), self.clip_norm)
        for gradient in gradients(pl_module):
            gradient.copy_(trainer.strategy.reduce(gradient.clone(), reduce_op="mean"))


class SamplesRepeated(pl.Callback):
    """Every rank trains on the first rank's samples."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for tensor in batch if isinstance(batch, list | tuple) else [batch]:
            tensor.copy_(trainer.strategy.broadcast(tensor))


class OtherInitialWeight(pl.Callback):
    """One weight of the last rank starts one thousandth off."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            weight = max(pl_module.parameters(), key=torch.Tensor.numel)
            with torch.no_grad():
                weight.view(-1)[0].add_(1e-3)


class StepSkipped(pl.Callback):
    """The second optimizer step changes nothing."""

    before: list[torch.Tensor] | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step == 1:
            self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if self.before is not None:
            for parameter, before in zip(pl_module.parameters(), self.before, strict=True):
                parameter.detach().copy_(before)
            self.before = None


def grid(trainer: pl.Trainer) -> Any:
    """The trainer's strategy, a GridEngine."""
    return trainer.strategy


class StagesSwapped(pl.Callback):
    """The first pipe rank's two stages each run a block of the other."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stages = grid(trainer).steps.pipeline.stages
        if 0 in stages:
            one, other = stages[0], stages[2]
            one.units[-1], other.units[0] = other.units[0], one.units[-1]


class MicroBatchDropped(pl.Callback):
    """The first stage forgets the gradients of the second micro-batch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pipeline = grid(trainer).steps.pipeline
        backward = pipeline.b

        def forgetful(stage: int, micro: int) -> None:
            before = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
            backward(stage, micro)
            if (stage, micro) == (0, 1):
                for parameter, gradient in zip(parameters, before, strict=True):
                    parameter.grad = gradient

        parameters = list(pl_module.parameters())
        pipeline.b = forgetful


class ClippedByStageNorm(pl.Callback):
    """Every stage clips its gradients by their own norm."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shards = grid(trainer).shards

        def clip(optimizer: Optimizer, clip_val: float) -> None:
            torch.nn.utils.clip_grad_norm_(shards.parts, clip_val)

        trainer.precision_plugin.clip_grad_by_norm = clip  # type: ignore[method-assign]


class TiedNotSummed(pl.Callback):
    """Both copies of the tied weight keep the gradient of their own place."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        grid(trainer).ties.sum_gradients = lambda: None


class ReshardedInBetween(pl.Callback):
    """FSDP lets go of gathered weights after each forward, though the backward of weights comes later."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for root in grid(trainer).steps.sharded_roots:
            root.set_reshard_after_forward(True)
            root.set_reshard_after_backward(True)
            root.set_reshard_after_backward = lambda *_: None


class NormsPartNotSummed(pl.Callback):
    """Tensor ranks keep their part of a norm's gradient, that of their part of the sequence."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from strategies.engines import tensor

        tensor.sum_partial_gradients = lambda parameters: None
