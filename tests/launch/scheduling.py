"""Models whose rates, or more of their optimizer, torch's own schedules move; for tests of what a checkpoint keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as torchs

from tests.strategies.own_models import Blocks


class Own(torchs.LRScheduler):
    """Halves the rate wherever the one before last was the same; counts in a list, which is no list of groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.seen: list[float] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        self.seen.append(self.optimizer.param_groups[0]["lr"])
        factor = 0.5 if len(self.seen) > 2 and self.seen[-1] == self.seen[-2] else 1.0
        self.optimizer.param_groups[0]["betas"] = (1 - 1 / (2 + len(self.seen)), 0.95)
        return [group["lr"] * factor for group in self.optimizer.param_groups]


class Restless(Own):
    """Its state is in a tensor."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.mean = torch.zeros(())
        super().__init__(optimizer)


class Growing:
    """A factor that remembers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / self.calls


def nested(optimizer: Optimizer) -> torchs.LRScheduler:
    parts = [torchs.LinearLR(optimizer, 0.1, 1.0, 3), torchs.ExponentialLR(optimizer, 0.7)]
    return torchs.ChainedScheduler([torchs.SequentialLR(optimizer, parts, [3]), torchs.StepLR(optimizer, 2, 0.9)])


KINDS: dict[str, Callable[[Optimizer], torchs.LRScheduler]] = {
    "sequential": lambda optimizer: torchs.SequentialLR(
        optimizer, [torchs.LinearLR(optimizer, 0.1, 1.0, 3), torchs.ExponentialLR(optimizer, 0.7)], [3]
    ),
    "chained": lambda optimizer: torchs.ChainedScheduler(
        [torchs.LinearLR(optimizer, 0.1, 1.0, 3), torchs.ExponentialLR(optimizer, 0.9)]
    ),
    "nested": nested,
    "one cycle": lambda optimizer: torchs.OneCycleLR(optimizer, 0.01, total_steps=6),
    "cyclic": lambda optimizer: torchs.CyclicLR(optimizer, 0.001, 0.01, step_size_up=3),
    "exponential": lambda optimizer: torchs.ExponentialLR(optimizer, 0.7),
    "several": lambda optimizer: torchs.MultiStepLR(optimizer, [1, 3], 0.3),
    "multiplied": lambda optimizer: torchs.MultiplicativeLR(optimizer, Growing()),
    "plateau": lambda optimizer: torchs.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
    "own": Own,
    "restless": Restless,
}


class Scheduled(Blocks):
    """Decays some; its schedule is one of KINDS."""

    def __init__(self, net: object, optimizer: Callable[..., Optimizer], scheduler: object, kind: str) -> None:
        super().__init__(net, optimizer, scheduler)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        matrices = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=0.003)
        config: dict[str, Any] = {"scheduler": KINDS[self.kind](optimizer), "interval": "step"}
        if self.kind == "plateau":
            config |= {"monitor": "val/loss", "frequency": self.trainer.val_check_interval}
        return {"optimizer": optimizer, "lr_scheduler": config}


class PlateauOfTraining(Scheduled):
    """Looks at a loss of each step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        return {**configured, "lr_scheduler": {**configured["lr_scheduler"], "monitor": "loss", "frequency": 1}}


class Counting(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


class Counts(Blocks):
    """Has in it a module with state that is no tensor."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net.append(Counting())
