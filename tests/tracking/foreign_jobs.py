"""Jobs that train the modules of tests.tracking.foreign on digits."""

from pathlib import Path
from typing import Any

from launch.job import Job, resolve
from launch.schema import validate
from launch.worker import train
from tests.composing import compose_fast
from tests.tracking import foreign

WORDS = [
    "model=vit_tiny", "data=digits", "optimizer=sgd", "optimizer.lr=0.77", "scheduler=constant",
    "trainer.max_steps=3", "trainer.val_every_steps=null", "trainer.trace_steps=0", "data.global_batch_size=8",
    "data.micro_batch_size=2", "data.max_val_samples=7", "logger=none", "checkpoint.at_end=false", "evidence=true",
    "launcher.accelerator=cpu",
]  # fmt: skip


def job_of(kind: type, folder: Path, *words: str, **keys: Any) -> Job:
    config = validate(compose_fast([*WORDS, *words, f"run_dir='{folder}'"]))
    model = {"_target_": f"{kind.__module__}.{kind.__name__}", **keys}
    if issubclass(kind, foreign.AsConfigured):
        model["optimizer"] = config.optimizer
    return Job.of(resolve(config.model_copy(update={"model": model})))


def train_rank(job: Job) -> None:
    train(job)
