"""A run that a signal ends has saved its work, says how to go on, and goes on as if nothing had been."""

import csv
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.compose import compose
from launch.signals import last_word, leave_last_word
from strategies.checkpoint import Manifest, checkpoints
from tests.launch.command import REPOSITORY, TINY, alive, family, user_environment, wait_for
from tests.launch.signalling import AFTER_STEPS
from tests.launch.warm import Command, start, train
from tracking.record import RunRecord
from tracking.status import read_status

STEPS = 12
RUN = ["strategy=ddp", *TINY, f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1", "run_dir=run"]
# Validation after AFTER_STEPS, in several batches: what the one signal interrupts.
VALIDATED = [f"trainer.val_every_steps={AFTER_STEPS}", "data.max_val_samples=32", "data.micro_batch_size=2"]


def losses(run_dir: Path) -> dict[int, tuple[str, str]]:
    """Training and validation loss by step, over all attempts: the last word on each counts."""
    found: dict[int, tuple[str, str]] = {}
    for folder in (*sorted((run_dir / "attempts").glob("*")), run_dir):
        with (folder / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                train_loss, val_loss = found.get(int(float(row["step"])), ("", ""))
                found[int(float(row["step"]))] = (row["train/loss"] or train_loss, row.get("val/loss") or val_loss)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = train(folder, *RUN, *VALIDATED)
    assert run.returncode == 0, run.stderr
    return folder / "run"


@pytest.mark.parametrize(
    ("model", "name", "code"),
    [
        ("EndsInAStep", "SIGTERM", 143),
        pytest.param("EndsInValidation", "SIGUSR1", 138, marks=pytest.mark.full),
    ],
)
def test_signalled_run_saves_and_goes_on_as_if_nothing_had_been(
    model: str, name: str, code: int, undisturbed: Path, tmp_path: Path
) -> None:
    words = [*RUN, *VALIDATED, f"model._target_=tests.launch.signalling.{model}"]
    run = train(tmp_path, *words)
    assert run.returncode == code, run.stderr
    assert f"{name}: ending after the next step" in run.stderr
    told = re.search(rf"ended by {name} after optimizer step (\d+), which is saved; go on by the same", run.stderr)
    assert told is not None, run.stderr
    assert "Traceback" not in run.stderr
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.exit_code) == ("interrupted", code)
    step = int(told[1])
    assert AFTER_STEPS <= step < STEPS
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08}"]
    again = train(tmp_path, *words, "resume=auto")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)
    results = [RunRecord.read(folder / "record.json").results for folder in (tmp_path / "run", undisturbed)]
    assert results[0].val_loss == results[1].val_loss


def signal_during_a_save(folder: Path, number: int) -> tuple[Command, list[psutil.Process]]:
    """A run that saves every step gets a signal while a checkpoint is half written; SIGKILL goes to all its ranks."""
    process = start(folder, *RUN, "trainer.max_steps=1000000", "checkpoint.every_steps=1")
    made = folder / "run" / "checkpoints"
    wait_for(lambda: len(checkpoints(folder / "run")) > 1 or process.poll() is not None, "the first checkpoints")
    processes = family(process.pid)
    wait_for(lambda: list(made.glob("*.partial")) or process.poll() is not None, "a save under way")
    assert process.poll() is None, (folder / "err").read_text()
    for one in processes if number == signal.SIGKILL else processes[:1]:
        one.send_signal(number)
    return process, processes


@pytest.mark.full
def test_signal_during_a_save_ends_in_order(tmp_path: Path) -> None:
    process, processes = signal_during_a_save(tmp_path, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    wait_for(lambda: not alive(processes), "the end of all processes", timeout_s=5)
    saved = json.loads((tmp_path / "run/ranks/ended.json").read_text())["step"]
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{saved:08}"
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))


def test_what_is_killed_during_a_save_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    process, processes = signal_during_a_save(tmp_path, signal.SIGKILL)
    wait_for(lambda: not alive(processes), "the end of all processes", timeout_s=5)
    newest = checkpoints(tmp_path / "run")[-1]
    step = int(newest.name.removeprefix("step-"))
    run = train(tmp_path, *RUN, f"trainer.max_steps={step + 2}", "resume=auto")
    assert run.returncode == 0, run.stderr
    assert f"resume=auto: going on from {newest}." in run.stderr
    assert f"step {step + 1}/{step + 2}" in run.stdout
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))
    attempt = read_status(tmp_path / "run/attempts/1")
    assert attempt is not None
    assert attempt.state == "lost"
    assert process.wait() == -signal.SIGKILL


@pytest.mark.full
def test_run_that_was_killed_behind_its_last_step_is_completed(undisturbed: Path, tmp_path: Path) -> None:
    """The last step is saved, but neither validated nor recorded."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "record.json").unlink()
    status = read_status(run_dir)
    assert status is not None
    status.model_copy(update={"state": "failed"}).write(run_dir)
    run = train(tmp_path, *RUN, *VALIDATED, "resume=auto")
    assert run.returncode == 0, run.stderr
    ours, theirs = (RunRecord.read(folder / "record.json").results for folder in (run_dir, undisturbed))
    assert (ours.steps, ours.val_loss) == (theirs.steps, theirs.val_loss)


@pytest.mark.full
def test_signal_to_all_processes_of_a_run_ends_it_in_order(tmp_path: Path) -> None:
    process = start(tmp_path, *RUN, "trainer.max_steps=1000000", "trainer.val_every_steps=null", "data.num_workers=1")
    metrics = tmp_path / "run/metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, "the first steps")
    processes = family(process.pid)
    for one in processes:
        one.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, (tmp_path / "err").read_text()
    wait_for(lambda: not alive(processes), "the end of all processes", timeout_s=10)
    told = (tmp_path / "err").read_text()
    step = json.loads((tmp_path / "run/ranks/ended.json").read_text())["step"]
    assert f"ended by SIGTERM after optimizer step {step}, which is saved; go on by the same command with" in told
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08}"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.full
def test_ranks_of_another_launcher_answer_signals_themselves(num_workers: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*RUN, "trainer.max_steps=1000000", "trainer.val_every_steps=null", f"data.num_workers={num_workers}"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [*command, str(REPOSITORY / "train.py"), *words],
            cwd=tmp_path, env=user_environment(), stdin=subprocess.DEVNULL, stdout=err, stderr=err,
        )  # fmt: skip
    metrics = tmp_path / "run/metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, "the first steps")
    processes = family(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    wait_for(lambda: not alive(processes), "the end of all processes", timeout_s=10)
    told = (tmp_path / "err").read_text()
    step = json.loads((tmp_path / "run/ranks/ended.json").read_text())["step"]
    assert f"ended by SIGTERM after optimizer step {step}, which is saved; go on by the same command with" in told
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.exit_code) == ("interrupted", 143)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08}"]


def test_command_to_go_on_by_is_one_that_a_shell_and_hydra_take(tmp_path: Path) -> None:
    run_dir = tmp_path / "Ann's runs, and (old) ones"
    (run_dir / "ranks").mkdir(parents=True)
    leave_last_word(run_dir, step=3, saved=True)
    overrides = shlex.split(last_word(run_dir, signal.SIGTERM).partition(" with ")[2])
    assert compose(overrides)["run_dir"] == str(run_dir)


@pytest.mark.full
def test_run_that_cannot_be_saved_ends_all_the_same(tmp_path: Path) -> None:
    run = train(tmp_path, *RUN, "evidence=true", "model._target_=tests.launch.signalling.EndsInAStep")
    assert run.returncode == 143, run.stderr
    assert re.search(r"ended by SIGTERM after optimizer step \d+, of which nothing is saved", run.stderr)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.full
def test_clock_of_the_first_rank_has_all_ranks_save(tmp_path: Path) -> None:
    words = ["checkpoint.every_minutes=0.005", "checkpoint.keep_last=1000", "trainer.max_steps=200"]
    run = train(tmp_path, *RUN, *words)
    assert run.returncode == 0, run.stderr
    found = checkpoints(tmp_path / "run")
    assert 2 < len(found) < 100
    steps = [int(folder.name.removeprefix("step-")) for folder in found[:-1]]  # the last is saved in any case
    assert all(later > earlier + 1 for earlier, later in itertools.pairwise(steps))
    for folder in found:
        Manifest.read(folder).check(folder)
