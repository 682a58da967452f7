"""`python -m tests.kills`: kills processes of runs that go on by `resume=auto`, again and again, at any moment.

No start may fail, and each run has to end, bit for bit, as one that was left alone. Which process (the dispatcher, its
zygote, the agent, any rank) and when, follows from a seed; the next start does not wait for what the kill has left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from strategies.checkpoint import checkpoints
from tests.agreement.free_cases import FREE
from tests.launch.command import family
from tests.launch.warm import Command, start, train
from tracking.evidence import Evidence

STRATEGIES = ("ddp", "zero2", "fsdp", "pipeline")
VICTIMS = ("dispatcher", "zygote", "agent", "rank 0", "rank 1")
STEPS = 16
START_S, STEP_S = 3.0, 0.5  # how long a start takes, and some steps: a kill comes within
TIMEOUT_S = 120


@dataclass(frozen=True)
class Kill:
    """Whom to kill, and when: so long after the start, or after the attempt's first checkpoint."""

    victim: str
    after_s: float
    of_steps: bool


def kills(seed: int) -> Iterator[Kill]:
    draw, number = random.Random(seed), 0
    while True:
        of_steps = bool(number % 2)
        yield Kill(draw.choice(VICTIMS), draw.uniform(0, STEP_S if of_steps else START_S), of_steps)
        number += 1


def words_of(strategy: str, run_dir: Path) -> list[str]:
    case = replace(FREE[strategy], world_size=2, accumulation=1)
    return [*case.overrides, f"trainer.max_steps={STEPS}", "checkpoint.every_steps=1", f"run_dir='{run_dir}'"]


def process_of(command: Command, victim: str) -> psutil.Process | None:
    """The process of a run that is called so; None while there is none."""
    with suppress(psutil.NoSuchProcess):
        dispatcher, *others = family(command.pid)
        if victim == "dispatcher":
            return dispatcher
        for process in others:
            if victim == "zygote" and process.ppid() == command.pid:
                return process
            if process.name() == victim or process.name().startswith(f"{victim} of "):
                return process
    return None


def killed(command: Command, kill: Kill, run_dir: Path) -> bool:
    """Kill a process of the run when it is time; False if the run had ended before there was one."""
    before = checkpoints(run_dir)
    while kill.of_steps and command.poll() is None and checkpoints(run_dir) == before:
        time.sleep(0.01)
    time.sleep(kill.after_s)
    while command.poll() is None:
        process = process_of(command, kill.victim)
        if process is not None:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
                return True
        time.sleep(0.01)
    return False


def disturb(strategy: str, folder: Path, plan: Iterator[Kill], count: int) -> list[Path]:
    """Kill `count` processes of runs of a strategy; the folders of these runs, all of which are completed."""
    runs: list[Path] = []
    done = 0
    while done < count or (runs and not is_completed(runs[-1])):
        if not runs or is_completed(runs[-1]):
            runs.append(folder / f"run-{len(runs)}")
        attempt = folder / f"attempt-{done:03}"
        attempt.mkdir(exist_ok=True)
        command = start(attempt, *words_of(strategy, runs[-1]), "resume=auto")
        kill = next(plan)
        was_killed = done < count and killed(command, kill, runs[-1])
        try:
            code = command.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{attempt}: it hangs, after {kill if was_killed else 'no kill'}") from None
        said = (attempt / "err").read_text()
        assert "Traceback" not in said, f"{attempt}, {kill}: {said}"
        assert was_killed or code == 0, f"{attempt}: start {done} after a kill failed with {code}: {said}"
        if was_killed:
            done += 1
            print(
                f"{strategy} {done}: {kill.victim} {kill.after_s:.2f} s after {'steps' if kill.of_steps else 'start'}"
            )
    return runs


def is_completed(run_dir: Path) -> bool:
    return (run_dir / "record.json").exists() and len(checkpoints(run_dir)) > 0 and last_step(run_dir) == STEPS


def last_step(run_dir: Path) -> int:
    return int(checkpoints(run_dir)[-1].name.removeprefix("step-"))


def check_same(run_dir: Path, left_alone: Path) -> None:
    """AssertionError unless a run has ended, bit for bit, as another."""
    ours, theirs = Evidence.load(run_dir), Evidence.load(left_alone)
    assert ours.val_losses == theirs.val_losses
    for mine, its in zip(ours.weights, theirs.weights, strict=True):
        assert mine.keys() == its.keys()
        assert all(np.array_equal(mine[fqn], its[fqn]) for fqn in mine), run_dir


def kill_and_compare(folder: Path, *, count: int, seed: int, strategies: tuple[str, ...] = STRATEGIES) -> int:
    """Kill `count` processes, as many under each strategy; how many runs have ended as they should."""
    ended = 0
    for number, strategy in enumerate(strategies):
        place = folder / strategy
        place.mkdir(parents=True)
        done = train(place, *words_of(strategy, place / "left-alone"), timeout_s=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        share = count // len(strategies) + (number < count % len(strategies))
        for run_dir in disturb(strategy, place, kills(seed + number), share):
            check_same(run_dir, place / "left-alone")
            ended += 1
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    words = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as folder:
        ended = kill_and_compare(Path(folder), count=words.kills, seed=words.seed, strategies=tuple(words.strategies))
        print(f"{words.kills} kills, seed {words.seed}: {ended} runs ended as if nothing had been.")


if __name__ == "__main__":
    main()
