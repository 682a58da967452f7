"""A run that is killed again and again, at any moment, ends as the run that was left alone."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from launch.attempts import number_attempt, pending
from launch.claim import claim_folder
from launch.job import Job
from launch.resume import resolve_resume
from launch.worker import train
from strategies.checkpoint import Manifest, checkpoints
from tests.agreement.free_cases import FREE
from tests.agreement.training import job_of
from tests.harness import TIMEOUT_S, Ranks
from tests.launch.command import wait_for
from tracking.evidence import Evidence
from tracking.evidence_recorder import sample_digests
from tracking.status import ended, running

WORLD = 2
SEED = 20


class History(Callback):
    """Writes down the samples of every step, at once: a rank that is killed can do so no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, sample_digests(batch)]) + "\n")


def train_rank(job: Job, folder: Path) -> None:
    train(job, callbacks=[History(folder)])


class Attempt:
    """The ranks of one attempt at a run, forked; there is no agent over them but the test."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.run_dir, self.status = job.run_dir, running("kills", "fsdp")
        claim_folder(self.run_dir, self.status, again=True)
        if pending(self.run_dir).exists():
            number_attempt(self.run_dir)
        self.job = Job.of(resolve_resume(job.config.model_copy(update={"resume": "auto"})))
        resume = self.job.config.resume
        self.first_step = Manifest.read(Path(resume)).step if resume else 0
        self.history = folder
        logs = [self.run_dir / "ranks" / f"{rank}.log" for rank in range(WORLD)]
        self.ranks = Ranks(logs, train_rank, (self.job, folder))

    def takes_steps(self) -> bool:
        return (self.history / "0.jsonl").exists()

    def kill(self, ranks: list[int]) -> None:
        """Kill some ranks, and at once the others, as an agent does that sees them end."""
        self.ranks.kill(ranks)
        self.ranks.kill()
        self.end()

    def end(self) -> list[int]:
        """Wait for the end of all ranks; those that failed."""
        self.ranks.wait(TIMEOUT_S)
        ended(self.status, "failed").write(self.run_dir)
        return self.ranks.failed


def final_history(attempts: list[Attempt]) -> list[list[str]]:
    """By step, the samples of all ranks that the final weights come from: an attempt undoes what came after its start.

    The samples of a step are in the order in which they were taken, so one that was seen twice shows.
    """
    steps: dict[int, list[str]] = {}
    for attempt in attempts:
        steps = {step: samples for step, samples in steps.items() if step < attempt.first_step}
        for path in attempt.history.glob("*.jsonl"):
            lines = path.read_text().splitlines()
            for step, samples in map(json.loads, lines):
                steps[step] = sorted([*steps.get(step, []), *samples])
    return [steps[step] for step in range(attempts[-1].job.config.trainer.max_steps)]


@pytest.mark.matrix
def test_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    kills = 50
    steps = 20 + 4 * kills  # more than are taken between kills
    words = [*FREE["fsdp"].overrides, f"launcher.devices={WORLD}", "data.micro_batch_size=16"]
    words += [f"trainer.max_steps={steps}", "checkpoint.every_steps=1"]
    left_alone = Attempt(job_of(words, tmp_path / "left-alone"), tmp_path / "history" / "left-alone")
    assert left_alone.end() == [], (left_alone.run_dir / "ranks/0.log").read_text()

    draw, job, attempts = random.Random(SEED), job_of(words, tmp_path / "killed"), []
    for number in range(kills):
        attempt = Attempt(job, tmp_path / "history" / str(number))
        attempts.append(attempt)
        assert attempt.first_step < steps, f"finished before {kills} kills: take more steps"
        assert attempt.job.config.resume == (str(found[-1]) if (found := checkpoints(job.run_dir)) else None)
        if number % 2:  # at any moment of its start, or of its steps and saves
            wait_for(attempt.takes_steps, "the first step")
        time.sleep(draw.uniform(0, 0.3))
        attempt.kill(draw.sample(range(WORLD), draw.randint(1, WORLD)))
    assert sum(attempt.takes_steps() for attempt in attempts) >= kills // 2
    attempts.append(Attempt(job, tmp_path / "history" / "last"))
    assert attempts[-1].end() == [], (job.run_dir / "ranks/0.log").read_text()

    assert final_history(attempts) == final_history([left_alone])
    ours, theirs = Evidence.load(job.run_dir), Evidence.load(left_alone.run_dir)
    assert ours.val_losses == theirs.val_losses
    for mine, its in zip(ours.weights, theirs.weights, strict=True):
        assert mine.keys() == its.keys()
        assert all(np.array_equal(mine[fqn], its[fqn]) for fqn in mine)
