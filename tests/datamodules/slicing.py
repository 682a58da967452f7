"""A Lightning Trainer of one process that takes itself for one data rank of several, and keeps what it sees."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

GLOBAL_BATCH, MICRO_BATCH = 8, 2

QUIET = [
    # Reading a memory map takes no worker process: Lightning's advice to start some does not hold for these loaders.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 asks torch 2.13 for the leaves of a batch in a way that is deprecated there.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class SliceStrategy(SingleDeviceStrategy):
    """One process that claims to be one data rank of several."""

    def __init__(self, data_rank: int, data_ranks: int) -> None:
        super().__init__(device="cpu")
        self.distributed_sampler_kwargs = {"num_replicas": data_ranks, "rank": data_rank}


class Recorder(LightningModule):
    """A model of one weight that keeps every batch it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        self.trained.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_for(*, data_rank: int = 0, data_ranks: int = 1, max_steps: int = 5) -> Trainer:
    return Trainer(
        strategy=SliceStrategy(data_rank, data_ranks),
        max_steps=max_steps,
        accumulate_grad_batches=GLOBAL_BATCH // (MICRO_BATCH * data_ranks),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
