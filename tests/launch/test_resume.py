"""`resume=` as a user types it: another strategy goes on at the next step; what does not fit is told in one line."""

import csv
from pathlib import Path

import pytest

from launch.dispatch import load_resolved
from strategies.checkpoint import checkpoints
from tests.launch.command import TINY, train
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


@pytest.mark.slow
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
    "another model": (["resume=first", "model.net.mlp_size=64"], ["model.net.mlp_size=64", "=32"]),
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


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line_before_anything_starts(
    words: tuple[list[str], list[str]], saved: Path, tmp_path: Path
) -> None:
    given, told = words
    given = [word.replace("resume=first", f"resume='{saved / 'first'}'") for word in given]
    run = train(tmp_path, *GO_ON, *given, "run_dir=run")
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert all(word in run.stderr for word in told), run.stderr
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "refused"


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
