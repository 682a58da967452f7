"""A run that went by W&B is read back as its folder has it: from the server, and from what an offline run has left."""

import dataclasses
import math
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.wandb_use import KEY, WANDB, Program, environment, programs, serve
from tracking.history import column_of
from tracking.sources import Run, collect, read_run
from tracking.wandb_source import logged


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with programs(tmp_path_factory.getbasetemp()) as run:
        yield run


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, train: Program) -> Path:
    """Where an offline run was made: its folder is `run`."""
    folder = tmp_path_factory.mktemp("offline")
    train(folder)
    return folder


READ = """
import pickle, sys
from pathlib import Path
from tracking.sources import collect
try:
    Path("runs").write_bytes(pickle.dumps(collect(sys.argv[1:])))
except ValueError as error:
    print(error, file=sys.stderr)
"""


def read(folder: Path, *sources: str, **variables: str) -> tuple[list[Run], str]:
    """What `collect` gives in a process of its own, and what is said on stderr."""
    (folder / "runs").unlink(missing_ok=True)
    command = [sys.executable, "-c", READ, *sources]
    env = environment(folder / "home", **variables)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True)
    path = folder / "runs"
    return pickle.loads(path.read_bytes()) if path.exists() else [], done.stderr


def sync(folder: Path, **variables: str) -> None:
    (run,) = (folder / "run" / "wandb").glob("offline-run-*")
    env = environment(folder / "home", **variables)
    subprocess.run([str(WANDB), "sync", str(run)], env=env, cwd=folder, capture_output=True, check=True, timeout=60)


def without_place(run: Run) -> Run:
    return dataclasses.replace(run, folder=None)


@pytest.mark.full
def test_a_run_that_was_synced_is_read_from_the_server_as_from_its_folder(offline: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "uploads") as variables:
        sync(offline, **variables)
        runs, said = read(offline, "wandb:team/concord/sweep-7", **variables)
    assert said == ""
    expected = read_run(offline / "run")
    assert expected.record and expected.trace and expected.verdict
    assert len(expected.history["train/loss"].steps) == 2
    assert runs == [without_place(expected)]


def test_what_an_offline_run_has_left_is_read_as_its_folder_was(offline: Path, tmp_path: Path) -> None:
    expected = without_place(read_run(offline / "run"))
    shutil.copytree(offline / "run" / "wandb", tmp_path / "wandb", symlinks=True)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    for source in (run, tmp_path / "wandb", tmp_path):
        (found,) = collect([str(source)])
        assert without_place(found) == expected
        assert found.folder == run


def test_of_a_run_folder_the_local_files_are_read(offline: Path) -> None:
    (run,) = collect([str(offline / "run")])
    assert run == read_run(offline / "run")


@pytest.mark.full
def test_a_run_that_failed_has_its_state_and_its_history(tmp_path: Path, train: Program) -> None:
    train(tmp_path, accident="run fails early")
    with serve(tmp_path / "uploads") as variables:
        sync(tmp_path, **variables)
        (online,), _ = read(tmp_path, "wandb:team/concord/sweep-7", **variables)
    (offline,) = collect([str(tmp_path / "run" / "wandb")])
    assert without_place(offline) == online
    assert (online.name, online.strategy, online.state) == ("first", "ddp", "failed")
    assert (online.record, online.error) == (None, "W&B has no record.json of it")
    assert online.history == {
        "train/loss": column_of({1: 3.5}),
        "perf/tokens_per_s": column_of({1: 1000.0}),
        "val/loss": column_of({1: 2.0}),
    }


def test_losses_that_are_no_numbers_are_read_and_other_values_are_not() -> None:
    rows = [{"step": 2, "train/loss": "NaN", "val/loss": "-Infinity", "text": "a", "image": {"path": "x"}, "_step": 7}]
    history = logged([*rows, {"train/loss": 1.0}])
    assert sorted(history) == ["train/loss", "val/loss"]
    assert list(history["train/loss"].steps) == [2] and math.isnan(history["train/loss"].values[0])
    assert list(history["val/loss"].values) == [-math.inf]


@pytest.mark.full
@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("wandb:concord/group", "is no group of runs; write wandb:<entity>/<project>/<group>."),
        ("wandb:team/concord/", "is no group of runs; write wandb:<entity>/<project>/<group>."),
        ("wandb:team/concord/other", "holds no run; see the group's name in W&B, or logger.group in resolved.yaml."),
        ("wandb:team/other/sweep-7", "cannot be read: Could not find project other"),
    ],
)
def test_a_source_that_is_malformed_or_not_there_is_one_line(tmp_path: Path, source: str, line: str) -> None:
    with serve(tmp_path / "uploads") as variables:
        assert read(tmp_path, source, **variables) == ([], f"{source} {line}\n")


@pytest.mark.full
def test_a_missing_key_is_one_line(tmp_path: Path) -> None:
    host = "http://127.0.0.1:9"
    line = f"wandb:a/b/c: no API key for {host}; `wandb login` stores one, or set WANDB_API_KEY.\n"
    assert read(tmp_path, "wandb:a/b/c", WANDB_BASE_URL=host) == ([], line)


@pytest.mark.full
def test_a_key_that_the_server_refuses_is_one_line(tmp_path: Path) -> None:
    with serve(tmp_path / "uploads", status=401) as variables:
        assert read(tmp_path, "wandb:a/b/c", **variables) == ([], unanswered(variables["WANDB_BASE_URL"]))


@pytest.mark.full
@pytest.mark.parametrize("listens", [False, True])
def test_a_server_that_cannot_be_reached_is_one_line(tmp_path: Path, listens: bool) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if listens:
            port.listen(50)
        host = f"http://127.0.0.1:{port.getsockname()[1]}"
        start = time.monotonic()
        assert read(tmp_path, "wandb:a/b/c", WANDB_BASE_URL=host, WANDB_API_KEY=KEY) == ([], unanswered(host))
        assert time.monotonic() - start < 30


def unanswered(host: str) -> str:
    advice = "does not answer, or does not take the key; see WANDB_BASE_URL and `wandb login`."
    return f"wandb:a/b/c cannot be read: {host} {advice}\n"
