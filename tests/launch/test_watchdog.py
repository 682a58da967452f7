"""A run that hangs ends, says which rank the others wait for and where, and leaves every rank's stacks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launch.failure import first_failure
from launch.hang import Standing, ended_path, judge
from launch.watchdog import Watchdog
from strategies.checkpoint import checkpoints
from tests.launch.command import REPOSITORY, TINY, alive, family, rank_process, user_environment, wait_for
from tests.launch.endless import ENDLESS, training
from tests.launch.hanging import HANGING_RANK, STEPS_BEFORE
from tests.launch.slow_disk import WRITE_S
from tests.launch.warm import Command, start, train

# A step takes 20 ms, but busy cores may leave a process without a turn for a second or two.
TIMEOUT_S = 3.0
IN_TRAINING = {"startup_timeout_s": 60.0, "timeout_s": TIMEOUT_S}
IN_START_UP = {"startup_timeout_s": 15.0, "timeout_s": 1800.0}  # outlasts imports and set-up on busy cores
# Start-up, the time of the watchdog, its grace, and the ten seconds that a rank gets which does not end by itself.
BOUND_S = 140

IN_STEP = f"in step {STEPS_BEFORE + 1}, training_step (hanging.py:"
IN_VALIDATION = "in validation after step 4, validation_step (hanging.py:"
IN_SET_UP = "in set-up, configure_optimizers (hanging.py:"


def words_of(limits: dict[str, float]) -> list[str]:
    return [f"launcher.{key}={seconds}" for key, seconds in limits.items()]


def ranks_logs(run_dir: Path) -> list[str]:
    return [(run_dir / f"ranks/{rank}.log").read_text() for rank in range(2)]


def finish(process: Command, processes: list[psutil.Process]) -> None:
    assert process.wait(timeout=BOUND_S) == 1
    wait_for(lambda: not alive(processes), f"the end of {alive(processes)}", timeout_s=5)


@pytest.mark.parametrize(
    ("strategy", "model", "limits", "place"),
    [
        ("ddp", "HangsInTraining", IN_TRAINING, IN_STEP),
        pytest.param("fsdp", "HangsInTraining", IN_TRAINING, IN_STEP, marks=pytest.mark.full),
        ("pipeline", "HangsInTraining", IN_TRAINING, IN_STEP),
        pytest.param("ddp", "HangsInValidation", IN_TRAINING, IN_VALIDATION, marks=pytest.mark.full),
        pytest.param("ddp", "HangsInSetUp", IN_START_UP, IN_SET_UP, marks=pytest.mark.full),
    ],
)
def test_hanging_rank_is_named(strategy: str, model: str, limits: dict[str, float], place: str, tmp_path: Path) -> None:
    words = [f"strategy={strategy}", *TINY, "model.net.num_layers=2", *words_of(limits), "run_dir=run"]
    process = start(tmp_path, *words, f"model._target_=tests.launch.hanging.{model}")
    run_dir = tmp_path / "run"
    wait_for(lambda: len(list(run_dir.glob("ranks/?.log"))) == 2, "the ranks", timeout_s=BOUND_S)
    finish(process, family(process.pid))
    error = (tmp_path / "err").read_text().strip().splitlines()[-1]
    named = (
        rf"rank {HANGING_RANK} of 2 hangs: no progress for (\d+) s {re.escape(place)}\d+\); the others wait for it; "
    )
    found = re.search(named + re.escape(f"see {run_dir}/ranks/{HANGING_RANK}.log"), error)
    assert found is not None, error
    timeout_s = min(limits.values())
    assert timeout_s - 1 <= float(found[1]) <= timeout_s + 3
    for log in ranks_logs(run_dir):
        assert "The stacks of its threads" in log
        assert "in train" in log.partition("The stacks of its threads")[2]
    assert "hanging.py" in ranks_logs(run_dir)[HANGING_RANK]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_rank_that_does_not_answer_is_named_and_killed(rank: int, tmp_path: Path) -> None:
    process = start(tmp_path, *ENDLESS, *words_of(IN_TRAINING))
    wait_for(lambda: training(tmp_path / "run") or process.poll() is not None, "the first steps")
    assert process.poll() is None, (tmp_path / "err").read_text()
    processes = family(process.pid)
    os.kill(rank_process(process.pid, rank).pid, signal.SIGSTOP)
    began = time.monotonic()
    finish(process, processes)
    assert time.monotonic() - began < TIMEOUT_S + 60
    error = (tmp_path / "err").read_text()
    assert re.search(rf"rank {rank} of 2 hangs: it has not answered for \d+ s; the others wait for it in step", error)
    assert f"see {tmp_path}/run/ranks/{rank}.log" in error
    assert "The stacks of its threads" in ranks_logs(tmp_path / "run")[1 - rank]


def test_steps_that_are_merely_slow_are_waited_for(tmp_path: Path) -> None:
    timeout_s = 5.0  # two steps take longer, each by itself leaves seconds for busy cores
    slow = {"FIRST_STEP_S": str(timeout_s + 1), "STEP_S": str(0.55 * timeout_s)}
    words = ["strategy=ddp", *TINY, *words_of({**IN_TRAINING, "timeout_s": timeout_s}), "run_dir=run"]
    run = train(tmp_path, *words, "model._target_=tests.launch.hanging.StartsSlowly", timeout_s=180, **slow)
    assert run.returncode == 0, run.stderr
    assert not list((tmp_path / "run").glob("ranks/*.hang.json"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_collectives_wait_longer_than_the_watchdog_of_either_phase(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("launch.watchdog.set_timeouts", waits.append)
    watchdog = Watchdog(tmp_path, rank=0, world_size=2, startup_timeout_s=60, timeout_s=3)
    trainer: Any = SimpleNamespace(
        global_step=7, lightning_module=None, accumulate_grad_batches=accumulation
    )  # of a resumed run
    watchdog.on_fit_start(trainer, trainer)
    found = []
    for _ in range(4 * accumulation):
        watchdog.on_train_batch_start(trainer)
        found.append((watchdog.allowed_s, waits[-1]))
    assert found == [(60, 120)] * 2 * accumulation + [(3, 63)] * 2 * accumulation


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_save_that_gets_on_is_waited_for(asynchronous: bool, tmp_path: Path) -> None:
    timeout_s = 0.6 * WRITE_S
    slow = ["model._target_=tests.launch.slow_disk.WritesSlowly", f"checkpoint.asynchronous={asynchronous}"]
    words = ["strategy=ddp", *TINY, *words_of({**IN_TRAINING, "timeout_s": timeout_s}), "run_dir=run"]
    run = train(tmp_path, *words, *slow)
    assert run.returncode == 0, run.stderr
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.mark.full
def test_rank_of_another_launcher_says_it_itself(tmp_path: Path) -> None:
    hangs = "model._target_=tests.launch.hanging.HangsInTraining"
    words = ["strategy=ddp", *TINY, *words_of(IN_TRAINING), hangs, "run_dir=run"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(REPOSITORY / "train.py")]
    run = subprocess.run(
        [sys.executable, *torchrun, *words],
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert run.returncode != 0
    assert run.stderr.count(f"rank {HANGING_RANK} of 2 hangs: no progress for") == 1


STANDING = Standing(
    rank=0,
    time=1000.0,
    silent_s=20.0,
    beats=14,
    collectives={"world": 23},
    waits=True,
    waits_in_call=True,
    during="step 3",
    place="training_step (mine.py:7)",
)


def cause_of(folder: Path, *standings: Standing, world_size: int = 2) -> tuple[int | None, str]:
    (folder / "ranks").mkdir(exist_ok=True)
    for standing in standings:
        standing.write(folder)
    hang = judge(folder, world_size)
    assert hang is not None
    return hang.rank, hang.cause


ANYWHERE = replace(STANDING, waits=False, waits_in_call=False)  # where a rank may wait that uses NCCL


@pytest.mark.parametrize(
    ("waiting", "lagging"),
    [
        (STANDING, replace(STANDING, beats=13)),
        (STANDING, replace(STANDING, beats=13, collectives={"world": 40})),
        (STANDING, replace(STANDING, collectives={"world": 22})),
        (STANDING, replace(STANDING, collectives={"world": 24}, waits=False)),  # in a pipeline
        (STANDING, replace(STANDING, collectives={"world": 23, "of ranks 1 and 2": 3}, waits=False)),
        (ANYWHERE, replace(ANYWHERE, collectives={"world": 22})),
        (ANYWHERE, replace(ANYWHERE, collectives={"world": 22}, waits=True)),
    ],
)
def test_who_lags_is_told_by_beats_collectives_and_waiting(
    waiting: Standing, lagging: Standing, tmp_path: Path
) -> None:
    rank, cause = cause_of(tmp_path, waiting, replace(lagging, rank=1))
    assert rank == 1
    assert cause == "hangs: no progress for 20 s in step 3, training_step (mine.py:7); the others wait for it"


def test_ranks_that_all_stand_alike_are_told_together(tmp_path: Path) -> None:
    ranks = [replace(STANDING, rank=rank) for rank in range(4)]
    rank, cause = cause_of(tmp_path, *ranks, world_size=4)
    assert rank is None
    assert cause == ("hang, and none lags: no progress for 20 s; ranks 0-3 in step 3, training_step (mine.py:7)")


def test_ranks_without_an_answer_are_told_unless_they_have_ended(tmp_path: Path) -> None:
    rank, cause = cause_of(tmp_path, STANDING, world_size=4)
    assert rank == 1
    assert cause.startswith("hangs: it has not answered for 20 s (nor ranks 2, 3); the others wait for it in step 3")
    for other in (1, 2, 3):
        ended_path(tmp_path, other).touch()
    rank, cause = cause_of(tmp_path, STANDING, world_size=4)
    assert (rank, cause.split(":")[0]) == (0, "hangs")
    assert "no progress for 20 s" in cause


@pytest.mark.parametrize(("seconds", "named"), [(-1, "raised KeyError: lost"), (1, "hangs: no progress")])
def test_an_exception_leads_only_if_it_came_before_the_hang(seconds: float, named: str, tmp_path: Path) -> None:
    cause_of(tmp_path, STANDING, replace(STANDING, rank=1, beats=13))
    word = {
        "time": STANDING.time + seconds,
        "message": "lost",
        "cause": "raised KeyError: lost",
        "user_error": False,
    }
    (tmp_path / "ranks/1.error.json").write_text(json.dumps(word))
    (tmp_path / "ranks/exit_codes.json").write_text(json.dumps({"0": -signal.SIGKILL}))
    failure = first_failure(tmp_path, 2, 0)
    assert failure is not None
    assert failure.cause.startswith(named)
