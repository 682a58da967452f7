"""A run whose rank dies ends soon, says which rank and why, and leaves no process behind."""

import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from launch.failure import described, record_error
from launch.schema import ConfigError
from models.refused import RefusedError as ModelRefusedError
from strategies.checkpoint import checkpoints
from tests.launch.command import TINY, rank_process
from tests.launch.endless import ENDLESS, assert_all_end, start_training
from tests.launch.slow_disk import SAVED_STEP
from tests.launch.warm import train
from tracking.status import read_status


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_killed_rank_is_named_and_ends_the_run(rank: int, tmp_path: Path) -> None:
    process, processes = start_training(tmp_path)
    rank_process(process.pid, rank).kill()
    assert process.wait(timeout=30) == 1
    assert_all_end(processes, within_s=5)
    error = (tmp_path / "err").read_text()
    assert f"rank {rank} of 2 was killed by SIGKILL; see {tmp_path}/run/ranks/{rank}.log" in error
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 1)


@pytest.mark.full
def test_run_that_fails_while_it_saves_finishes_the_checkpoint(tmp_path: Path) -> None:
    model = "model._target_=tests.launch.slow_disk.RaisesWhileItSaves"
    run = train(tmp_path, *ENDLESS, model, f"checkpoint.every_steps={SAVED_STEP}")
    assert run.returncode == 1
    assert "rank 1 of 2 raised RuntimeError: boom after a save has begun" in run.stderr
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{SAVED_STEP:08}"]


def test_killed_dispatcher_leaves_no_process_and_reads_as_lost(tmp_path: Path) -> None:
    process, processes = start_training(tmp_path)
    process.kill()
    process.wait()
    assert_all_end(processes)
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "lost"


def test_interrupt_leaves_no_process(tmp_path: Path) -> None:
    process, processes = start_training(tmp_path, "checkpoint.every_steps=2", "checkpoint.keep_last=2")
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert_all_end(processes, within_s=5)
    assert time.monotonic() - began < 10  # 3 on a machine that has nothing else to do
    said = (tmp_path / "err").read_text()
    assert re.search(
        rf"interrupted by Ctrl-C; optimizer step \d+ is saved: go on by .* run_dir={tmp_path}/run resume=auto", said
    )
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "interrupted"


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("RaisesOnRank1", "rank 1 of 2 raised ValueError: boom on rank 1 (failing.py:"),
        ("SegfaultsOnRank1", "rank 1 of 2 was killed by SIGSEGV; see "),
        pytest.param(
            "AbortsOnRank1", "rank 1 of 2 was killed by SIGABRT: sizes do not match; see ", marks=pytest.mark.full
        ),
    ],
)
def test_cause_on_one_rank_is_named(model: str, cause: str, tmp_path: Path) -> None:
    began = time.monotonic()
    run = train(tmp_path, *ENDLESS, f"model._target_=tests.launch.failing.{model}")
    assert run.returncode == 1
    assert cause in run.stderr
    assert f"{tmp_path}/run/ranks/1.log" in run.stderr
    assert time.monotonic() - began < 60
    assert len([line for line in run.stderr.splitlines() if "rank 1 of 2" in line]) == 1


@pytest.mark.parametrize(
    ("error", "cause", "is_worded"),
    [
        (ConfigError("seed=x: no"), "raised ConfigError: seed=x: no (test_failures.py:", True),
        (ModelRefusedError("net=x: no"), "raised RefusedError: net=x: no (test_failures.py:", True),
        (
            ValueError("model.net.width=3 is odd"),
            "raised ValueError: model.net.width=3 is odd (test_failures.py:",
            False,
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), "could not write /d/x: No space left on", False),
    ],
)
def test_errors_that_are_worded_for_users_are_told_from_faults(
    error: Exception, cause: str, is_worded: bool, tmp_path: Path
) -> None:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001  # it has a traceback now
        record_error(tmp_path, 0, caught)
    word = json.loads((tmp_path / "ranks/0.error.json").read_text())
    assert word["cause"].startswith(cause)
    assert word["user_error"] is is_worded


def test_fault_is_placed_in_the_code_that_a_user_can_mend(tmp_path: Path) -> None:
    try:
        json.loads("{")
    except ValueError as error:
        assert re.fullmatch(r"JSONDecodeError: .* \(test_failures.py:\d+\)", described(error))


@pytest.mark.full
def test_rank_logs_hold_each_ranks_output(tmp_path: Path) -> None:
    run = train(tmp_path, "strategy=ddp", *TINY, "trainer.log_every_steps=1", "run_dir=run")
    assert run.returncode == 0, run.stderr
    assert "step 4/4" in (tmp_path / "run/ranks/0.log").read_text()
    assert "step 4/4" in run.stdout
    assert (tmp_path / "run/ranks/1.log").exists()
