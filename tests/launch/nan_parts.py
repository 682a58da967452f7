"""Language models of which one module breaks on the last rank, in one optimizer step and micro-batch."""

from typing import Any

import torch
from torch import Tensor, nn

from models.language import LanguageModel

PLACE, STEP, MICRO_BATCH = "blocks.3.mlp", 2, 2  # counted from 1


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


class BreaksForward(LanguageModel):
    calls = 0

    def configure_model(self) -> None:
        super().configure_model()
        self.net.get_submodule(PLACE).register_forward_hook(self.spoil)

    def spoil(self, part: nn.Module, args: Any, output: Tensor) -> Tensor:
        trainer = self._trainer
        if trainer is None or not trainer.training or trainer.global_step != STEP - 1:
            return output
        if self.global_rank != trainer.world_size - 1 or torch._C._current_graph_task_id() != -1:
            return output
        self.calls += 1
        return self.spoiled(output) if self.calls == MICRO_BATCH else output

    def spoiled(self, output: Tensor) -> Tensor:
        return output * float("nan")


class BreaksBackward(BreaksForward):
    def spoiled(self, output: Tensor) -> Tensor:
        return NanGradient.apply(output)


class BreaksLoss(BreaksForward):
    """Its loss is a number, whose gradient is none."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        is_due = self._trainer is not None and self._trainer.global_step == STEP - 1
        return NanGradient.apply(loss) if is_due else loss

    def spoiled(self, output: Tensor) -> Tensor:
        return output
