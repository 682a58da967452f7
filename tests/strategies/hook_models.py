"""LightningModules that override hooks: one that counts how often each is called, and some that do something of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from tests.strategies.own_models import Blocks

HOOKS = (
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "on_after_backward",
    "on_after_batch_transfer",
    "on_before_backward",
    "on_before_batch_transfer",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_fit_end",
    "on_fit_start",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_train_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_train_start",
    "on_validation_batch_end",
    "on_validation_batch_start",
    "on_validation_end",
    "on_validation_epoch_end",
    "on_validation_epoch_start",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_model_zero_grad",
    "on_validation_start",
    "optimizer_step",
    "optimizer_zero_grad",
    "prepare_data",
    "setup",
    "transfer_batch_to_device",
)


class Counts(Blocks):
    """Each hook that is overridden by `counting` is counted, and does what it does without."""

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: Callable[..., Any]) -> None:
        super().__init__(net, optimizer, scheduler)
        self.counts: Counter[str] = Counter()
        self.make_scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def teardown(self, stage: str) -> None:
        path = Path(self.trainer.default_root_dir) / f"counts.{self.global_rank}.json"
        path.write_text(json.dumps(self.counts))


def counting(*hooks: str) -> type[Counts]:
    def counted(hook: str) -> Callable[..., Any]:
        plain = getattr(pl.LightningModule, hook)

        def call(self: Counts, *args: Any, **kwargs: Any) -> Any:
            self.counts[hook] += 1
            return plain(self, *args, **kwargs)

        return call

    return type(
        f"Counts_{'_'.join(hooks)}" if len(hooks) == 1 else "CountsMany", (Counts,), {h: counted(h) for h in hooks}
    )


# What DeepSpeed, shards and pipelines do by themselves.
OWN = ("backward", "configure_gradient_clipping", "optimizer_zero_grad")
CountsAll = counting(*HOOKS)
CountsBackward = counting(*(hook for hook in HOOKS if hook not in OWN[1:]))
CountsOthers = counting(*(hook for hook in HOOKS if hook not in OWN))


class TakesNoNumber(Blocks):
    def training_step(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self.loss(batch)


class StepsEverySecond(Blocks):
    """As Lightning's documentation has it: of other batches nothing but the closure is called."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class EndsEpoch(Blocks):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class FetchesByItself(Blocks):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)
