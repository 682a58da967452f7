"""-m hparams=: Optuna's search over runs, in which a failed trial counts as failed and nothing more."""

import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.entry import objective
from launch.schema import ConfigError
from launch.search import check_changed, refers, split
from tests.launch.command import TINY, wait_for
from tests.launch.warm import start, train
from tests.tracking.examples import found, record
from tests.tracking.runs import run as made_run
from tracking.record import RunRecord
from tracking.status import read_status

SEARCH = ["-m", *TINY, "trainer.max_steps=2", "checkpoint.at_end=false", "hydra.sweep.dir=search"]
# A rate of 1e38 makes the weights infinite in the first step: the loss of the second is no number.
ONE_FAILS = [
    "hparams=own", "hparams.sampler=random", "scheduler=constant", "scheduler.warmup_steps=0",
    "optimizer.lr=choice(1e-3, 1e-2, 1e38)",
]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("search")
    run = train(folder, *SEARCH, *ONE_FAILS, "hparams.trials=6", "trainer.clip_norm=null", timeout_s=400)
    return folder / "search", run


@pytest.mark.full
def test_a_search_ends_with_the_best_of_the_trials_that_did_not_fail(
    search: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, run = search
    found = results(folder)
    failed = [job for job in range(6) if read_status(folder / str(job)).state == "failed"]  # type: ignore[union-attr]
    assert 0 < len(failed) < 6
    assert (found["trials"], found["failed"]) == (6, failed)
    losses = {
        job: RunRecord.read(folder / f"{job}/record.json").results.val_loss for job in range(6) if job not in failed
    }
    assert found["best_value"] == losses[found["best_trial"]] == min(losses.values())  # type: ignore[type-var]
    assert run.returncode == 0, run.stderr
    assert "trainer.on_nan=stop" in run.stderr
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith(
        f"best is trial {found['best_trial']} with val_loss {found['best_value']:.6g}: optimizer.lr="
    )
    assert f"{len(failed)} of 6 failed (trial" in last


@pytest.mark.full
def test_a_search_that_is_over_runs_nothing_when_it_is_resumed(
    search: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, first = search
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/status.json")}
    run = train(folder.parent, "resume_sweep=search")
    assert run.returncode == 0, run.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/status.json")} == before
    assert run.stdout.strip().splitlines()[-1] == first.stdout.strip().splitlines()[-1]


@pytest.mark.full
def test_another_search_in_the_folder_of_one_is_refused(
    search: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = search
    page = folder / "compare.html"
    before = page.stat().st_mtime_ns
    run = train(folder.parent, *SEARCH, "hparams=lr", "hparams.trials=2", "strategy=single")
    assert run.returncode == 2 and "already holds a search" in run.stderr
    assert "best is trial" not in run.stdout and page.stat().st_mtime_ns == before


@pytest.mark.full
def test_an_interrupted_search_is_resumed_at_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["hparams=lr", "hparams.trials=3", "trainer.max_steps=20", "model._target_=tests.launch.hanging.IsSlow"]
    monkeypatch.setenv("STEP_S", "0.2")
    process = start(tmp_path, *SEARCH, *words)
    folder = tmp_path / "search"
    wait_for(lambda: (folder / "1/metrics.csv").exists(), "the second trial", timeout_s=200)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert results(folder)["trials"] == 1
    kept = yaml.safe_load((folder / "1/resolved.yaml").read_text())["optimizer"]
    run = train(tmp_path, "resume_sweep=search", timeout_s=300, STEP_S="0")
    assert run.returncode == 0, run.stderr
    assert (results(folder)["trials"], results(folder)["failed"]) == (3, [])
    resolved = [yaml.safe_load((folder / f"{job}/resolved.yaml").read_text())["optimizer"] for job in range(3)]
    assert resolved[1] == kept
    assert len({optimizer["lr"] for optimizer in resolved}) == 3


@pytest.mark.full
def test_without_any_trial_that_completes_a_search_fails(tmp_path: Path) -> None:
    words = ["hparams=lr", "hparams.trials=2", "objective=time_to_loss", "objective.loss=0.001"]
    run = train(tmp_path, *SEARCH, *words, timeout_s=200)
    assert run.returncode == 1
    assert "objective.loss=0.001 was not reached (lowest training loss: 5." in run.stderr
    assert run.stdout.strip().splitlines()[-1] == "no trial has a time_to_loss: 2 of 2 failed (trials 0, 1)"


def test_objectives_are_read_from_what_a_run_has_left() -> None:
    run = made_run("ddp", losses=(4.0, 3.0, 2.0), step_ms=100.0, found={"val_loss": 2.5})
    assert objective(run, "val_loss", None) == 2.5
    assert objective(run, "step_ms", None) == 100.0
    assert objective(run, "time_to_loss", 3.5) == pytest.approx(2.0)  # 20 steps
    with pytest.raises(ValueError, match="was not reached"):
        objective(run, "time_to_loss", 1.0)
    with pytest.raises(ValueError, match="step_ms"):
        objective(made_run("ddp", found={"step_ms_p50": None}), "step_ms", None)


def test_the_command_line_goes_before_the_choice() -> None:
    params = {"optimizer.lr": "tag(log, interval(1e-4, 1e-2))", "optimizer.weight_decay": "interval(0.0, 0.3)"}
    fixed, space = split(params, ["optimizer.weight_decay=0.1", "data.global_batch_size=8,16", "strategy=ddp"])
    assert fixed == ["optimizer.weight_decay=0.1", "strategy=ddp"]
    assert sorted(space) == ["data.global_batch_size", "optimizer.lr"]
    rate: Any = space["optimizer.lr"]
    assert (rate.low, rate.high, rate.log) == (1e-4, 1e-2, True)
    whole: Any = split({}, ["model.net.num_layers=int(interval(1, 4))"])[1]["model.net.num_layers"]
    assert type(whole).__name__ == "IntDistribution"


@pytest.mark.parametrize(("asked", "is_refused"), [(False, True), (True, False), (None, False)])
def test_a_search_ends_where_a_trial_shows_that_the_module_makes_another_optimizer(
    asked: bool | None, is_refused: bool, tmp_path: Path
) -> None:
    record(found=found(asked=asked)).write(tmp_path / "record.json")
    check_changed(["model.net.num_layers"], tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.lr would change nothing") if is_refused else nullcontext():
        check_changed(["optimizer.lr"], tmp_path)


def test_a_model_may_take_the_optimizer_or_one_number_of_it() -> None:
    assert refers({"net": {"size": 8}, "optimizer": "${optimizer}"})
    assert refers({"groups": [{"lr": "${optimizer.lr}"}]})
    assert not refers({"net": {"size": "${data.vocab_size}"}, "lr": 0.1, "optimizer": "adamw"})


REFUSED = {
    "one run": (["hparams=lr"], "hparams=lr searches by several runs; add -m."),
    "no trial": (["-m", "hparams=lr", "hparams.trials=0"], "hparams.trials: Input should be greater than 0 (got 0)."),
    "nothing to search": (["-m", "hparams=own"], "hparams: there is nothing to search; give a key an interval"),
    "no such objective": (["-m", "hparams=lr", "objective=speed"], "objective/speed"),
    "no loss to reach": (["-m", "hparams=lr", "objective=time_to_loss"], "objective.loss has no value"),
    "interval that is none": (["-m", "hparams=own", "optimizer.lr=tag(log, interval(0, 1))"], "optimizer.lr="),
    "optimizer that no model takes": (
        ["-m", "hparams=lr", "~model.optimizer"],
        "hparams: optimizer.lr and optimizer.weight_decay would change nothing, as "
        "model=models.language.LanguageModel takes no ${optimizer}; search keys of the model",
    ),
    "interval without a search": (["-m", "optimizer.lr=interval(0, 1)"], "add hparams=own"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistake_gets_one_line(mistake: str, tmp_path: Path) -> None:
    words, line = REFUSED[mistake]
    run = train(tmp_path, *words, *TINY)  # where -m stands, overrides begin
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert line in run.stderr
