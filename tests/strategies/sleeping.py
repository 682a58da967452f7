"""Blocks that sleep for a known time instead of computing."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from models.plan import ParallelPlan
from strategies.schedules import SCHEDULES, Name
from tests.strategies.own_models import Blocks

STEPS = 4  # the first is not timed: it allocates, and makes the connections


# A step's other work (Lightning, optimizer, messages) is 10 to 50 ms on a machine that others use, too: against it
# blocks sleep so long, and steps in all.
LEAST_BLOCK_S, LEAST_STEP_S = 0.04, 1.0


class Pause(torch.autograd.Function):
    """Hands on what it gets after `forward_s`, and its gradient after `backward_s`; on meta there is no time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = 0.0 if x.is_meta else backward_s
        time.sleep(0.0 if x.is_meta else forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradient, None, None


class SleepingBlock(nn.Module):
    """Input and weight pause in nodes of their own, so that either half of a backward can be run without the other."""

    def __init__(self, size: int, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        seconds = self.seconds if self.training else 0.0
        weight = Pause.apply(self.linear.weight, 0.0, seconds)
        return nn.functional.linear(Pause.apply(x, seconds, seconds), weight)


class SleepingBlocks(Blocks):
    """As many blocks as a net of ours would have layers.

    The stem costs nothing, but without it the first block would have no gradient to hand back, and half a backward.
    """

    plan = ParallelPlan(stem=("stem",), blocks=("blocks.*",), head=("head",))

    def __init__(self, net: Any, optimizer: Any, scheduler: object, block_s: float) -> None:
        super().__init__(net, optimizer, scheduler)
        self.num_blocks, self.block_s = net.keywords["num_layers"], block_s

    def configure_model(self) -> None:
        with torch.device("meta"):
            blocks = nn.Sequential(*(SleepingBlock(64, self.block_s) for _ in range(self.num_blocks)))
            self.net = nn.Sequential(OrderedDict(stem=nn.LayerNorm(64), blocks=blocks, head=nn.Linear(64, 10)))


class Clock(pl.Callback):
    """Writes down when each step was over; all ranks are there at once, since they clip by a common norm."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "ends.json").write_text(json.dumps(self.ends))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A pipeline with one block in each stage."""

    schedule: Name
    ranks: int
    micro_batches: int
    strategy: str = "pipeline"

    def __str__(self) -> str:
        return f"{self.strategy}-{self.schedule}-{self.ranks}-ranks-{self.micro_batches}"

    @property
    def rank_stages(self) -> int:
        return SCHEDULES[self.schedule].stages_per_rank or 2

    @property
    def block_s(self) -> float:
        """A block's forward; its backward takes twice as long, half of it for the gradient of its weight."""
        return max(LEAST_BLOCK_S, LEAST_STEP_S / 3 / (self.micro_batches + self.ranks - 1))

    @property
    def work_s(self) -> float:
        """A step of ranks that never wait."""
        return 3 * self.block_s * self.micro_batches * self.rank_stages

    @property
    def overrides(self) -> list[str]:
        chosen = [f"strategy.schedule={self.schedule}", f"strategy.micro_batches={self.micro_batches}"]
        return [
            f"strategy={self.strategy}",
            *(chosen if self.strategy == "pipeline" else []),
            f"launcher.devices={self.ranks}",
            "launcher.accelerator=cpu",
            "model=vit_tiny",
            "model._target_=tests.strategies.sleeping.SleepingBlocks",
            f"model.net.num_layers={self.ranks * self.rank_stages}",
            f"+model.block_s={self.block_s}",
            "data=digits",
            "data.global_batch_size=8",
            "data.micro_batch_size=8",
            "data.max_val_samples=8",
            f"trainer.max_steps={STEPS}",
            "trainer.val_every_steps=null",
            "logger=none",
            "evidence=true",  # or else each run would first measure its device for as long as a step takes
        ]
