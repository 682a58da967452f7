"""A run of another host: its folder can be had when nothing is heard of it any more, and not before."""

import os
import signal
import time
from pathlib import Path
from threading import Event

import pytest

from launch.claim import claim_folder
from launch.lease import beating
from launch.schema import ConfigError
from tests.launch.command import wait_for
from tracking.status import RunStatus, read_status, running

BEAT_S = 0.1
ELSEWHERE = ("pod-7f9c", 1, 0.0)


def run_elsewhere(run_dir: Path, beat_s: float | None) -> RunStatus:
    """A folder as a run of another host has it."""
    (run_dir / "ranks").mkdir(parents=True)
    status = running("any", "any", beat_s=beat_s).model_copy(update={"dispatcher": ELSEWHERE})
    status.write(run_dir)
    return status


def claim(run_dir: Path) -> None:
    claim_folder(run_dir, running("any", "any"), again=True)


@pytest.mark.parametrize("clock", [0, 2_000_000_000], ids=["behind", "ahead"])
def test_run_of_another_host_of_which_nothing_is_heard_is_taken_over(
    clock: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_elsewhere(tmp_path, BEAT_S)
    os.utime(tmp_path / "status.json", (clock, clock))  # whatever that host's clock says
    claim(tmp_path)
    told = capsys.readouterr().err
    assert "waiting 0.6 s for a sign of life of process 1 on pod-7f9c" in told
    assert "process 1 on pod-7f9c has given none; taking over." in told
    status = read_status(tmp_path)
    assert status is not None
    assert status.dispatcher != ELSEWHERE


def test_run_of_another_host_that_lives_is_refused(tmp_path: Path) -> None:
    with (
        beating(tmp_path, run_elsewhere(tmp_path, BEAT_S)),
        pytest.raises(ConfigError, match=r"still runs \(process 1 on pod-7f9c\); wait for its end\.$"),
    ):
        claim(tmp_path)
    assert (tmp_path / "status.json").exists()


def test_run_of_another_host_that_gives_no_sign_of_life_is_believed(tmp_path: Path) -> None:
    run_elsewhere(tmp_path, None)
    with pytest.raises(ConfigError, match=r"if that machine is gone, remove \S+/status\.json\.$"):
        claim(tmp_path)


def test_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    running("any", "any", beat_s=60).write(tmp_path)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="still runs"):
        claim(tmp_path)
    assert time.monotonic() - start < 5


def test_signs_of_life_end_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with beating(tmp_path, run_elsewhere(tmp_path, BEAT_S)):
        first = path.stat().st_mtime_ns
        wait_for(lambda: path.stat().st_mtime_ns != first, "a beat", timeout_s=5)
    time.sleep(2 * BEAT_S)
    last = path.stat().st_mtime_ns
    time.sleep(5 * BEAT_S)
    assert path.stat().st_mtime_ns == last


def test_run_whose_folder_was_taken_over_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ended = Event()
    sent: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        ended.set()

    monkeypatch.setattr(os, "kill", kill)
    with beating(tmp_path, run_elsewhere(tmp_path, BEAT_S)):
        time.sleep(3 * BEAT_S)
        assert not sent
        running("any", "any").write(tmp_path)
        assert ended.wait(5)
    assert sent[0] == (os.getpid(), signal.SIGKILL)
    assert f"run_dir={tmp_path} was taken over by another process; this one ends." in capsys.readouterr().err
