"""What a run is known to have done (it sleeps, and is counted by other means) stands on its page."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import pytest

from launch.job import Job
from launch.worker import train
from tests.agreement.training import job_of, run_job
from tests.strategies.sleeping import SleepingBlocks
from tracking.comparison import compare_runs
from tracking.page import page
from tracking.sources import read_run
from tracking.timeline import counts_of
from tracking.traffic import CollectiveTimer

FORWARD_S = (0.05, 0.1)  # of each rank's only block; its backward takes twice as long
ACCUMULATION, STEPS, LOG_EVERY, COUNTED_STEP = 2, 8, 2, 6
# What else a step does; against it sleeps are long. Other work on the machine can only make it more.
MOST_ELSE_S = 0.15
STEP_S = ACCUMULATION * 3 * max(FORWARD_S)


class UnevenBlocks(SleepingBlocks):
    def __init__(self, net: Any, optimizer: Any, scheduler: object) -> None:
        super().__init__(net, optimizer, scheduler, FORWARD_S[int(os.environ["RANK"])])


class Notes(pl.Callback):
    """The losses of a rank, and what it hands to collectives in a step that is not traced."""

    def __init__(self) -> None:
        self.timer = CollectiveTimer(time.perf_counter)
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == COUNTED_STEP and len(self.losses) % ACCUMULATION == 0:
            self.timer.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(ACCUMULATION * float(outputs["loss"]))  # Lightning has divided it
        if trainer.global_step == COUNTED_STEP and len(self.losses) == ACCUMULATION * COUNTED_STEP:
            self.timer.__exit__(None, None, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sent = counts_of(self.timer.calls, lambda call: call.collective)
        notes = {"losses": self.losses, "sent": sent}
        (Path(trainer.default_root_dir) / f"notes{trainer.global_rank}.json").write_text(json.dumps(notes))


def train_rank(job: Job) -> None:
    train(job, callbacks=[Notes()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [
        "strategy=ddp",
        "model=vit_tiny",
        "model._target_=tests.tracking.test_measured_page.UnevenBlocks",
        "model.net.num_layers=1",
        "data=digits",
        f"data.global_batch_size={4 * 2 * ACCUMULATION}",
        "data.micro_batch_size=4",
        "data.max_val_samples=8",
        f"trainer.max_steps={STEPS}",
        f"trainer.log_every_steps={LOG_EVERY}",
        "trainer.val_every_steps=4",
        "logger=none",
        "launcher.devices=2",
        "launcher.accelerator=cpu",
    ]
    job = job_of(words, folder)
    run_job(job, train_rank, job)
    return folder


@pytest.fixture(scope="module")
def shown(folder: Path) -> Mapping[str, Any]:
    """The run's figures as they are embedded in its page."""
    html = page(compare_runs([read_run(folder)]))
    found = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))["runs"][0]


@pytest.fixture(scope="module")
def notes(folder: Path) -> list[Any]:
    return [json.loads((folder / f"notes{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.full
def test_times_are_those_of_the_sleeps(shown: Mapping[str, Any]) -> None:
    assert STEP_S <= shown["step_ms_p50"] / 1000 < STEP_S + MOST_ELSE_S
    samples = 4 * 2 * ACCUMULATION
    assert shown["tokens_per_s"] == pytest.approx(samples / (shown["step_ms_p50"] / 1000))
    fast, slow = shown["wait_share_by_rank"]
    assert fast == pytest.approx(1 - FORWARD_S[0] / FORWARD_S[1], abs=0.1) and slow < 0.1
    for rank, forward_s in enumerate(FORWARD_S):
        bars = [bar for bar in shown["gantt"] if bar["rank"] == rank]
        forwards = [bar for bar in bars if bar["category"] == "forward"]
        assert [bar["micro_batch"] for bar in forwards] == list(range(ACCUMULATION))
        for bar in forwards:
            assert forward_s <= bar["duration_ms"] / 1000 < forward_s + MOST_ELSE_S


@pytest.mark.full
def test_bytes_are_those_that_were_counted(shown: Mapping[str, Any], notes: list[Any]) -> None:
    told = {part["collective"]: [part["calls"], part["payload"]] for part in shown["traffic"]}
    assert told == notes[0]["sent"] == notes[1]["sent"]
    assert told["all_reduce"][1] > 4 * 64 * 64  # the block's gradient, at least


@pytest.mark.full
def test_losses_are_those_of_the_steps(shown: Mapping[str, Any], notes: list[Any], folder: Path) -> None:
    per_row = LOG_EVERY * ACCUMULATION
    for row, loss in enumerate(shown["curve"]["train_loss"]):
        those = [fmean(note["losses"][row * per_row : (row + 1) * per_row]) for note in notes]
        assert loss == pytest.approx(fmean(those), rel=1e-6)
    assert shown["curve"]["steps"] == [2, 4, 6, 8]
    assert shown["curve"]["validations"]["steps"] == [4, 8]
    assert shown["curve"]["validations"]["loss"][-1] == shown["val_loss"]
    written = list(read_run(folder).history["train/loss"].values)
    assert shown["curve"]["train_loss"] == written
