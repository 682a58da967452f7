"""A small training under a real Trainer, of which is known how long everything takes."""

import csv
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader


class Slow(pl.LightningModule):
    """Its loss is the batch's value, and each of its steps takes a known time."""

    def __init__(self, step_s: float = 0.0, validation_s: float = 0.0, fetch_s: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.step_s, self.validation_s, self.fetch_s = step_s, validation_s, fetch_s
        self.ended: list[float] = []  # when each micro-batch's training_step was over

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # The first two steps are slow, as first steps are.
        time.sleep(0.2 if self.step_s and self.global_step < 2 else self.step_s)
        self.ended.append(time.perf_counter())
        return self.weight * 0 + batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(self.validation_s)
        self.log("val/loss", batch.mean())
        self.log("val/accuracy", batch.mean() / 10)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Values(self.fetch_s), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Values(0.0, 4), batch_size=1)


class Values(torch.utils.data.Dataset[float]):
    """Sample i is the number first + i."""

    def __init__(self, fetch_s: float, count: int = 1000, first: int = 0) -> None:
        self.fetch_s, self.count, self.first = fetch_s, count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> float:
        time.sleep(self.fetch_s)
        return float(self.first + index)


def fit(
    folder: Path,
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    max_steps: int = 20,
    accumulate: int = 1,
    **keys: Any,
) -> list[dict[str, str]]:
    """Train, and read back the rows of metrics.csv."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="", version=""),
        num_sanity_val_steps=keys.pop("num_sanity_val_steps", 0),
        limit_val_batches=keys.pop("limit_val_batches", 0),
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **keys,
    )
    trainer.fit(module)
    if not (folder / "metrics.csv").exists():
        return []
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
