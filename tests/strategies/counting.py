"""Models whose bytes are counted."""

from __future__ import annotations

import numpy as np

from datamodules.loading import BatchDataset
from datamodules.spec import SampledData
from launch.job import Job
from launch.worker import build_model
from models.stats import ModelStats, measure

ODD = [  # sizes that no number of ranks divides
    "model=gpt_tiny",
    "model.net.num_layers=4",
    "model.net.num_heads=3",
    "model.net.num_kv_heads=1",
    "model.net.hidden_size=42",
    "model.net.mlp_size=97",
    "data=text",
    "data.sequence_length=16",
]


EVEN = [  # what 4 tensor ranks divide
    *ODD,
    "model.net.num_layers=3",
    "model.net.num_heads=4",
    "model.net.num_kv_heads=4",
    "model.net.hidden_size=56",
    "model.net.mlp_size=100",
]


# The second step is counted: the first allocates, a pipeline tells shapes in it, and ZeRO's stage 3 makes the trace
# that it follows from then on.
TWO_STEPS = [
    "trainer.max_steps=2",
    "trainer.val_every_steps=null",
    "trainer.log_every_steps=1000",
    "data.max_val_samples=4",
    "logger=none",
    "launcher.accelerator=cpu",
]


DEEP_ODD = [*ODD, "model.net.num_layers=6", "data.global_batch_size=24", *TWO_STEPS]


def stats_of(job: Job) -> ModelStats:
    model = build_model(job.config)
    model.configure_model()
    assert isinstance(job.data, SampledData)
    return measure(model, BatchDataset(job.data.train_samples())[np.zeros(1, dtype=np.int64)])
