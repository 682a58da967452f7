"""LightningModules as their users write them, each of which settles by itself what a config might say otherwise."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from models.plan import ParallelPlan


class OwnAdamW(pl.LightningModule):
    """Makes its own optimizer, whatever the config says."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))
    format: torch.dtype | None = None  # of what the net takes, where that is not what there is

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.keys_given = keys
        self.net = self.make_net()

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        pixels = images.flatten(1)
        return cross_entropy(self.net(pixels if self.format is None else pixels.to(self.format)).float(), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=3e-4, betas=(0.8, 0.9), weight_decay=0.02)


class TwoGroups(OwnAdamW):
    """A head that learns faster, and does not decay."""

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        base = [parameter for fqn, parameter in named if not fqn.startswith("net.3.")]
        head = [parameter for fqn, parameter in named if fqn.startswith("net.3.")]
        groups: list[dict[str, Any]] = [{"params": base}, {"params": head, "lr": 0.2, "weight_decay": 0.0}]
        return SGD(groups, lr=0.05, momentum=0.8, weight_decay=1e-4)


class Bfloat16(OwnAdamW):
    """Holds its weights in bfloat16, as a checkpoint in that format leaves them."""

    format = torch.bfloat16

    def make_net(self) -> nn.Module:
        return super().make_net().to(torch.bfloat16)


class Widens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class MixedFormats(OwnAdamW):
    """A body in bfloat16, a head in float32."""

    plan = ParallelPlan()
    format = torch.bfloat16

    def make_net(self) -> nn.Module:
        body = nn.Sequential(nn.Linear(64, 16), nn.GELU()).to(torch.bfloat16)
        return nn.Sequential(body, Widens(), nn.Linear(16, 10))


class FrozenBase(OwnAdamW):
    """Trains its last layer."""

    def make_net(self) -> nn.Module:
        net = super().make_net()
        net.requires_grad_(False)
        net.get_submodule("3").requires_grad_(True)
        return net

    def configure_optimizers(self) -> Any:
        return SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.1)


class Tied(OwnAdamW):
    """Two layers of one matrix."""

    def make_net(self) -> nn.Module:
        net = super().make_net()
        net.get_submodule("2").register_parameter("weight", net.get_submodule("1").weight)  # type: ignore[arg-type]
        return net


class Buffers(OwnAdamW):
    """Running statistics, and a mask that no state dict holds."""

    plan = ParallelPlan()

    def make_net(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
        net.register_buffer("mask", torch.ones(7), persistent=False)
        return net


class OwnSchedule(OwnAdamW):
    """Its first step is at a tenth of its rate."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.5, nesterov=True, momentum=0.9)
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AsConfigured(OwnAdamW):
    """Takes the config's optimizer."""

    def __init__(self, optimizer: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.make_optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class OwnRate(AsConfigured):
    """Takes the config's optimizer, and another rate."""

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=0.033)


class Ignores(AsConfigured):
    """Is given the config's optimizer, and makes another."""

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=0.011)


class LogsAlone(OwnAdamW):
    """Logs as one process would, without a word of ranks."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]))
        self.log("val/most", batch[1].float().max(), reduce_fx="max")
        if self.global_rank == 0 and self.keys_given.get("unlike"):
            self.log("val/first", 1.0)

    def on_validation_epoch_end(self) -> None:
        if self.keys_given.get("at_end"):
            self.log("val/end", float(self.global_rank))
