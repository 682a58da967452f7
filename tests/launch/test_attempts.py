"""What becomes of an earlier attempt's files: a run that does not go on leaves them as they were."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from launch import alive
from launch.attempts import earlier_status, number_attempt, pending, set_attempt_aside
from launch.claim import claim_folder, recover_folder
from launch.schema import ConfigError
from tests.launch.command import TINY
from tests.launch.warm import train
from tracking.status import RunStatus, ended, read_status, running

WORDS = [*TINY, "strategy=single", "model.net.num_layers=1", "run_dir=run"]


def files(run_dir: Path) -> dict[str, bytes]:
    """All that lies in a folder, but what claims it."""
    paths = (path for path in sorted(run_dir.rglob("*")) if path.is_file() and path.name not in (".claim", ".alive"))
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completed")
    run = train(folder, *WORDS, "checkpoint.at_end=true")
    assert run.returncode == 0, run.stderr
    return folder


def test_refused_resume_leaves_a_completed_run_as_it_was(completed: Path) -> None:
    before = files(completed / "run")
    run = train(completed, *WORDS, "resume=auto", "data.global_batch_size=16")
    assert run.returncode == 2
    assert "data.global_batch_size=16" in run.stderr.splitlines()[-1]
    assert files(completed / "run") == before
    status = read_status(completed / "run")
    assert status is not None
    assert status.state == "completed"
    assert "record.json" in before


def left_by(run_dir: Path, state: str) -> RunStatus:
    """A folder as an attempt has left it."""
    (run_dir / "ranks").mkdir(parents=True)
    (run_dir / "ranks/0.log").write_text("its words")
    (run_dir / "record.json").write_text("{}")
    status = ended(running("any", "any"), "completed").model_copy(update={"state": state})
    status.write(run_dir)
    return status


def lost() -> RunStatus:
    """The status of a process that was killed."""
    return running("any", "any").model_copy(update={"dispatcher": (os.uname().nodename, 2**22 + 1, 0.0)})


def test_attempt_that_is_killed_before_it_began_takes_nothing_away(tmp_path: Path) -> None:
    left_by(tmp_path, "completed")
    before = files(tmp_path)
    claim_folder(tmp_path, lost(), again=True)
    assert files(tmp_path) != before
    recover_folder(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_attempt_that_is_killed_while_files_are_moved_takes_nothing_away(moved: int, tmp_path: Path) -> None:
    left_by(tmp_path, "completed")
    before = files(tmp_path)
    claim_folder(tmp_path, lost(), again=True)
    for path in sorted(pending(tmp_path).iterdir(), reverse=True)[:moved]:  # some were not moved yet, or are back
        if (tmp_path / path.name).is_dir():
            (tmp_path / path.name).rmdir()
        path.replace(tmp_path / path.name)
    recover_folder(tmp_path)
    assert files(tmp_path) == before


def test_attempt_under_preparation_keeps_its_folder(tmp_path: Path) -> None:
    left_by(tmp_path, "completed")
    claim_folder(tmp_path, running("any", "any"), again=True)
    recover_folder(tmp_path)
    assert sorted(path.name for path in pending(tmp_path).iterdir()) == ["ranks", "record.json", "status.json"]


def test_strange_file_among_attempts_is_no_attempt(tmp_path: Path) -> None:
    for number in ("1", "2"):
        left_by(tmp_path, "failed")
        set_attempt_aside(tmp_path)
        (tmp_path / "attempts/.DS_Store").touch()
        number_attempt(tmp_path)
        assert (tmp_path / "attempts" / number / "record.json").exists()


@pytest.mark.parametrize("content", ["", "\0" * 100, '{"name": "a'], ids=["empty", "zeros", "cut"])
def test_status_that_a_loss_of_power_has_cut_is_named_and_passed_over(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    left_by(tmp_path, "failed")
    (tmp_path / "status.json").write_text(content)
    assert earlier_status(tmp_path) is None
    assert capsys.readouterr().err == f"{tmp_path}/status.json is damaged; going on as if it were not there.\n"
    claim_folder(tmp_path, running("any", "any"), again=True)


def test_short_files_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []

    def fsync(descriptor: int) -> None:
        held.append(Path(f"/proc/self/fd/{descriptor}").readlink().read_text())
        assert not (tmp_path / "status.json").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    running("any", "any").write(tmp_path)
    assert held == [(tmp_path / "status.json").read_text()]


def dying(run_dir: Path, seconds: float) -> subprocess.Popen[bytes]:
    """A process of an attempt whose dispatcher, this process, is gone by now."""
    alive.take(run_dir)
    process = subprocess.Popen(["sleep", str(seconds)], pass_fds=alive.files())
    alive.give_up(run_dir)
    return process


def test_attempt_waits_for_what_the_one_before_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    left_by(tmp_path, "failed")
    process, start = dying(tmp_path, 0.5), time.monotonic()
    monkeypatch.setattr(alive, "QUIET_S", 0.1)
    claim_folder(tmp_path, running("any", "any"), again=True)
    assert time.monotonic() - start > 0.4
    process.wait()
    told = f"{tmp_path}: waiting for the end of process {process.pid} of an earlier attempt.\n"
    assert capsys.readouterr().err == told


def test_process_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(tmp_path, "failed")
    before = files(tmp_path)
    process = dying(tmp_path, 60)
    monkeypatch.setattr(alive, "WAIT_S", 0.1)
    with pytest.raises(ConfigError, match=f"process {process.pid} of an earlier attempt did not end in 0.1 s; end it"):
        claim_folder(tmp_path, running("any", "any"), again=True)
    assert files(tmp_path) == before
    process.kill()
    process.wait()


def test_host_that_is_gone_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = left_by(tmp_path, "failed")
    status.model_copy(update={"dispatcher": ("another", 1, 0.0)}).write(tmp_path)
    process = dying(tmp_path, 60)
    monkeypatch.setattr(alive, "WAIT_S", 0.1)
    claim_folder(tmp_path, running("any", "any"), again=True)
    process.kill()
    process.wait()
