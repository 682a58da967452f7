"""`resume=` as a user types it: another strategy goes on at the next step; what does not fit is told in one line."""

import csv
import errno
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launch.dispatch import load_resolved
from launch.resume import find, newest_good, newest_own, started_from
from launch.schema import ConfigError
from strategies import checkpoint
from strategies.checkpoint import MANIFEST, checkpoints, note_val_loss, val_losses
from tests.launch.command import TINY, wait_for
from tests.launch.warm import start, train
from tracking.status import read_status


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, saved after the second and the last."""
    folder = tmp_path_factory.mktemp("saved")
    words = ["strategy=ddp", "checkpoint.every_steps=2", "run_dir=first", "model.net.num_layers=2"]
    run = train(folder, *TINY, *words)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in checkpoints(folder / "first")] == ["step-00000002", "step-00000004"]
    return folder


GO_ON = [*TINY, "model.net.num_layers=2", "trainer.max_steps=6", "trainer.log_every_steps=1"]


@pytest.mark.full
def test_another_strategy_goes_on_at_the_next_step(saved: Path) -> None:
    words = ["strategy=pipeline", "resume=first", "run_dir=second", "checkpoint.at_end=true"]
    run = train(saved, *GO_ON, *words)
    assert run.returncode == 0, run.stderr
    assert load_resolved(saved / "second").resume == str(saved / "first/checkpoints/step-00000004")
    with (saved / "second/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == ["5", "6"]
    assert [path.name for path in checkpoints(saved / "second")] == ["step-00000006"]


REFUSED = {
    "nothing there": (["resume=nowhere"], ["resume=nowhere is no checkpoint"]),
    "steps that are done already": (["resume=first", "trainer.max_steps=4"], ["trainer.max_steps=4", "4 steps"]),
    "another model": (
        ["resume=first", "model.net.mlp_size=64"],
        ["model.net.mlp_size=64", "=32", "by model.net.mlp_size weights have their shapes, which cannot differ"],
    ),
    "another model, and another batch": (
        ["resume=first", "model.net.mlp_size=64", "data.global_batch_size=16"],
        ["give the same model.net.mlp_size", "the others may, resume_despite=[data.global_batch_size]"],
    ),
    "another model all the same": (
        ["resume=first", "model.net.mlp_size=64", "resume_despite=[model.net.mlp_size]"],
        ["mlp.", "in shape (32, 16), not (64, 16); give the model that wrote it: no resume_despite changes that"],
    ),
    "another optimizer": (
        ["resume=first", "optimizer=sgd"],
        ["exp_avg, exp_avg_sq, step, and SGD keeps momentum_buffer; choose the optimizer that wrote it"],
    ),
    "another batch": (
        ["resume=first", "data.global_batch_size=16"],
        ["data.global_batch_size=16", "data.global_batch_size=8", "resume_despite=[data.global_batch_size]"],
    ),
    "another order": (["resume=first", "seed=2"], ["data.seed=2", "data.seed=1"]),
    "what is on a disk of its own": (
        ["resume=first", "strategy=zero3_nvme", "strategy.offload.nvme_path=."],
        ["strategy=zero3_nvme", "strategy=zero3_offload"],
    ),
}


ASKED_WITH_TORCH = ("another model all the same", "another optimizer")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(case, id=name, marks=[pytest.mark.full] * (name in ASKED_WITH_TORCH))
        for name, case in REFUSED.items()
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_starts(
    words: tuple[list[str], list[str]], saved: Path, tmp_path: Path
) -> None:
    given, told = words
    given = [word.replace("resume=first", f"resume='{saved / 'first'}'") for word in given]
    run = train(tmp_path, *GO_ON, *given, "run_dir=run")
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert all(word in run.stderr for word in told), run.stderr
    assert not list(tmp_path.iterdir())


def test_folder_of_checkpoints_means_the_newest(saved: Path) -> None:
    assert find(str(saved / "first/checkpoints")) == saved / "first/checkpoints/step-00000004"


def test_key_that_may_differ_is_named(saved: Path, tmp_path: Path) -> None:
    """What is refused otherwise gets further: to the next thing that does not fit."""
    words = [f"resume='{saved / 'first'}'", "seed=2", "resume_despite=[data.seed]", "trainer.max_steps=3"]
    run = train(tmp_path, *GO_ON, *words, "run_dir=run")
    assert "trainer.max_steps=3" in run.stderr


def test_damaged_checkpoint_is_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/step-00000002"
    source = saved / "first/checkpoints/step-00000002"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    broken = bytearray((folder / "1.safetensors").read_bytes())
    broken[-1] ^= 1
    (folder / "1.safetensors").write_bytes(broken)
    run = train(tmp_path, *GO_ON, f"resume='{folder}'", "run_dir=run")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "1.safetensors is damaged" in run.stderr


def copied(run_dir: Path, folder: Path) -> Path:
    """A run that another test may damage."""
    shutil.copytree(run_dir / "checkpoints", folder / "checkpoints")
    return folder


def flip_bit(newest: Path) -> None:
    content = bytearray((newest / "0.safetensors").read_bytes())
    content[len(content) // 2] ^= 8
    (newest / "0.safetensors").write_bytes(content)


def lose_shard(newest: Path) -> None:
    (newest / "1.safetensors").unlink()


def cut_json(newest: Path) -> None:
    text = (newest / MANIFEST).read_text()
    (newest / MANIFEST).write_text(text[: len(text) // 2])


@pytest.mark.parametrize("damage", [flip_bit, lose_shard, cut_json])
def test_newest_that_is_whole_is_found(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before, newest = checkpoints(copied(saved / "first", tmp_path))
    damage(newest)
    assert newest_good(tmp_path) == before
    told = capsys.readouterr().err
    assert str(newest) in told
    assert len(told.splitlines()) == 1
    cut_json(before)
    assert newest_good(tmp_path) is None


def newer_version(newest: Path) -> None:
    text = (newest / MANIFEST).read_text()
    (newest / MANIFEST).write_text(text.replace('"version":1', '"version":2'))


@pytest.mark.parametrize("damaged", [(4,), (2, 4)], ids=str)
def test_checkpoint_of_a_newer_version_is_neither_passed_over_nor_renamed(
    damaged: tuple[int, ...], saved: Path, tmp_path: Path
) -> None:
    folders = checkpoints(copied(saved / "first", tmp_path / "run"))
    for step in damaged:
        newer_version(folders[step // 2 - 1])
    run = train(tmp_path, *GO_ON, "strategy=single", "resume=auto", "run_dir=run")
    assert run.returncode == 2
    assert f"{folders[-1] / MANIFEST} is of version 2, this Concord reads version 1" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert checkpoints(tmp_path / "run") == folders


@pytest.mark.parametrize("place", ["digest", "is_file", "read_bytes", "iterdir"])
def test_checkpoint_that_cannot_be_read_is_neither_passed_over_nor_taken_for_none(
    place: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(saved / "first", tmp_path)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint if place == "digest" else Path, place, fail)
    with pytest.raises(ConfigError, match=r"^resume=auto: \S+ cannot be read \(Input/output error\)"):
        newest_own(tmp_path)


def test_run_whose_checkpoints_are_all_damaged_is_not_started_anew(saved: Path, tmp_path: Path) -> None:
    folders = checkpoints(copied(saved / "first", tmp_path / "run"))
    for folder in folders:
        flip_bit(folder)
    run = train(tmp_path, *GO_ON, "strategy=single", "resume=auto", "run_dir=run")
    assert run.returncode == 2
    told = f"no checkpoint in {tmp_path}/run/checkpoints is whole; to start anew, rename that folder."
    assert run.stderr.splitlines()[-1] == f"resume=auto: {told}"
    assert checkpoints(tmp_path / "run") == folders


@pytest.mark.parametrize("content", ["", "\0" * 9, '{"2": 1'], ids=["empty", "zeros", "cut"])
def test_validation_losses_that_a_loss_of_power_has_cut_are_named_and_passed_over(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    note_val_loss(tmp_path, 2, 1.5)
    assert val_losses(tmp_path) == {2: 1.5}
    (tmp_path / "checkpoints/val_losses.json").write_text(content)
    assert val_losses(tmp_path) == {}
    assert "val_losses.json is damaged; going on as if it were not there." in capsys.readouterr().err


def attempt(run_dir: Path, number: int, resume: Path | str | None) -> None:
    """What an attempt that has begun leaves of its config; a str as it stands."""
    folder = run_dir / "attempts" / str(number)
    folder.mkdir(parents=True)
    tree = {"run_dir": str(run_dir), "resume": None if resume is None else str(resume)}
    (folder / "resolved.yaml").write_text(resume if isinstance(resume, str) else yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("resumes", "expected"),
    [
        ((), None),
        ((None,), None),
        ((Path("/other/checkpoints/step-4"),), "/other/checkpoints/step-4"),
        ((Path("/other/checkpoints/step-4"), "", "\0\0"), "/other/checkpoints/step-4"),
        ((Path("/other/checkpoints/step-4"), Path("{run}/checkpoints/step-8")), "/other/checkpoints/step-4"),
        ((Path("/other/checkpoints/step-4"), None), None),
    ],
)
def test_what_a_run_has_started_from_is_what_its_attempts_say(
    resumes: tuple[Path | str | None, ...], expected: str | None, tmp_path: Path
) -> None:
    for number, resume in enumerate(resumes, 9):  # of 9 and 10, 10 is the later
        attempt(tmp_path, number, Path(str(resume).format(run=tmp_path)) if isinstance(resume, Path) else resume)
    assert started_from(tmp_path) == expected


@pytest.mark.full
def test_run_that_ended_before_its_first_checkpoint_starts_from_that_of_another_again(
    saved: Path, tmp_path: Path
) -> None:
    words = [*GO_ON, "strategy=single", "run_dir=run"]
    broken = "model._target_=tests.launch.failing.RaisesAtStart"
    run = train(tmp_path, *words, f"resume='{saved}/first'", broken, "resume_despite=[model._target_]")
    assert run.returncode == 1
    assert not checkpoints(tmp_path / "run")
    run = train(tmp_path, *words, "resume=auto")
    assert run.returncode == 0, run.stderr
    other = saved / "first/checkpoints/step-00000004"
    told = f"{tmp_path}/run holds no checkpoint; starting from {other}, as its earlier attempt did."
    assert f"resume=auto: {told}" in run.stderr
    assert "step 5/6" in run.stdout


@pytest.mark.full
def test_sweep_from_a_checkpoint_is_resumed_from_what_its_jobs_have(saved: Path, tmp_path: Path) -> None:
    models = "models.language.LanguageModel,tests.launch.failing.RaisesAtStart"
    words = [*GO_ON, "strategy=single", f"model._target_={models}", "resume_despite=[model._target_]"]
    train(tmp_path, "-m", *words, f"resume='{saved}/first'", "hydra.sweep.dir=jobs")
    for name in ("resolved.yaml", "status.json"):  # as if the sweep had been killed before its first job began
        (tmp_path / "jobs/0" / name).unlink()
    run = train(tmp_path, "resume_sweep=jobs")
    assert run.returncode == 1  # the broken model is still broken
    for job, state in (("0", "completed"), ("1", "failed")):
        status = read_status(tmp_path / "jobs" / job)
        assert status is not None
        assert status.state == state, run.stderr
        assert load_resolved(tmp_path / "jobs" / job).resume is not None


def test_damaged_checkpoint_that_was_asked_for_is_refused_and_another_offered(saved: Path, tmp_path: Path) -> None:
    before, newest = checkpoints(copied(saved / "first", tmp_path))
    flip_bit(newest)
    run = train(tmp_path, *GO_ON, f"resume='{newest}'", "run_dir=run")
    assert run.returncode == 2
    assert f"{newest}/0.safetensors is damaged" in run.stderr
    assert f"{before} is whole" in run.stderr


@pytest.mark.full
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one(saved: Path, tmp_path: Path) -> None:
    before, newest = checkpoints(copied(saved / "first", tmp_path / "run"))
    flip_bit(newest)
    run = train(tmp_path, *GO_ON, "strategy=single", "resume=auto", "run_dir=run")
    assert run.returncode == 0, run.stderr
    assert f"{newest}/0.safetensors is damaged" in run.stderr
    assert f"resume=auto: going on from {before}." in run.stderr
    assert "step 3/6" in run.stdout
    assert checkpoints(tmp_path / "run") == [before, newest.with_name("step-00000006")]
    assert newest.with_name("step-00000004.damaged").exists()


@pytest.mark.full
def test_run_that_is_complete_is_not_run_again(saved: Path) -> None:
    run = train(saved, *TINY, "strategy=ddp", "model.net.num_layers=2", "run_dir=first", "resume=auto")
    assert run.returncode == 0, run.stderr
    assert not (saved / "first/attempts").exists()


@pytest.mark.full
def test_data_may_move_but_not_change(tmp_path: Path) -> None:
    text = "\f".join(f"Chapter {number}. " + "All happy families are alike. " * 20 for number in range(20))
    books = tmp_path / "books"
    books.mkdir()
    (books / "one.txt").write_text(text)
    words = [*TINY, "trainer.max_steps=2", "strategy=single"]
    run = train(tmp_path, *words, "data.files='books/*.txt'", "checkpoint.every_steps=1", "run_dir=first")
    assert run.returncode == 0, run.stderr
    go_on = [*words, "trainer.max_steps=3", "resume=first", "data.files='novels/*.txt'"]
    books.rename(tmp_path / "novels")
    run = train(tmp_path, *go_on, "run_dir=second")
    assert run.returncode == 0, run.stderr
    (tmp_path / "novels/one.txt").write_text(text.replace("happy", "angry"))
    run = train(tmp_path, *go_on, "run_dir=third")
    assert run.returncode == 2
    assert "hold something else than what it was trained on" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    run = train(tmp_path, *go_on, "resume_despite=[data.digest]", "run_dir=fourth")
    assert run.returncode == 0, run.stderr
    (tmp_path / "novels/one.txt").unlink()
    run = train(tmp_path, *go_on, "run_dir=fifth")
    assert run.returncode == 2
    assert "data.files='novels/*.txt' matches no file" in run.stderr


@pytest.mark.full
def test_folder_of_a_run_that_still_runs_is_refused(tmp_path: Path) -> None:
    words = ["strategy=single", *TINY, "trainer.max_steps=1000000", "trainer.val_every_steps=null", "run_dir=run"]
    first = start(tmp_path, *words)
    try:
        wait_for((tmp_path / "run/status.json").exists, "the first run")
        for resume, told in (("null", "already holds another run (running)"), ("auto", "still runs (process")):
            second = train(tmp_path, *words, f"resume={resume}")
            assert second.returncode == 2
            assert told in second.stderr
            assert len(second.stderr.splitlines()) == 1
        assert first.poll() is None
        status = read_status(tmp_path / "run")
        assert status is not None
        assert status.state == "running"
        wait_for((tmp_path / "run/metrics.csv").exists, "its metrics")
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=30) == 130


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 5 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.full
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk_ends_the_run_and_keeps_the_checkpoint_before(
    asynchronous: str, small_disk: Path, tmp_path: Path
) -> None:
    words = ["strategy=ddp", *TINY, "model.net.hidden_size=128", "model.net.mlp_size=512", "trainer.max_steps=6"]
    words += ["checkpoint.every_steps=2", f"checkpoint.asynchronous={asynchronous}", f"run_dir={small_disk}/run"]
    run = train(tmp_path, *words)
    assert run.returncode == 1, run.stderr
    assert re.search(r"checkpoint: \S+/step-00000004 cannot be written \(No space left on device\)", run.stderr)
    assert "go on from the one before by the same command with resume=auto" in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in checkpoints(small_disk / "run")] == ["step-00000002"]
    status = read_status(small_disk / "run")
    assert status is not None
    assert status.state == "failed"
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    run = train(tmp_path, *words, "resume=auto")
    assert run.returncode == 0, run.stderr
    assert "step 6/6" in run.stdout
