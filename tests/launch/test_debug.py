"""debug=: the module that makes NaN is named under every strategy; collectives are left behind when a run hangs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.command import TINY, user_environment
from tests.launch.hanging import HANGING_RANK
from tests.launch.nan_parts import MICRO_BATCH, PLACE, STEP
from tests.launch.warm import train

# Two micro-batches in each step, also of a pipeline, which has cut `PLACE` to its second rank.
DEEP = [*TINY, "model.net.num_layers=4", "checkpoint.at_end=false", "run_dir=run"]
STRATEGIES = {
    "single": ["strategy=single"],
    "ddp": ["strategy=ddp", "data.micro_batch_size=2"],
    "zero3": ["strategy=zero3", "data.micro_batch_size=2"],
    "fsdp": ["strategy=fsdp", "data.micro_batch_size=2"],
    "tensor": ["strategy=tensor"],
    "pipeline": ["strategy=pipeline", "strategy.micro_batches=2", "data.micro_batch_size=8"],
    "activation checkpointing": ["strategy=ddp", "data.micro_batch_size=2", "strategy.activation_checkpointing=full"],
}


def line_of(tmp_path: Path, model: str, strategy: str) -> str:
    words = [*DEEP, *STRATEGIES[strategy], f"model._target_=tests.launch.nan_parts.{model}", "debug=nan"]
    run = train(tmp_path, *words, timeout_s=300)
    assert run.returncode == 1, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if "debug=nan" in line]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_module_that_gives_nan_is_named(strategy: str, tmp_path: Path) -> None:
    rank = 0 if strategy == "single" else 1
    assert line_of(tmp_path, "BreaksForward", strategy) == (
        f"debug=nan: net.{PLACE} gives nan in its forward, in optimizer step {STEP}, micro-batch {MICRO_BATCH}, "
        f"on rank {rank}; its input was finite."
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "tensor"])
def test_module_whose_backward_gives_nan_is_named(strategy: str, tmp_path: Path) -> None:
    rank = 0 if strategy == "single" else 1
    assert line_of(tmp_path, "BreaksBackward", strategy) == (
        f"debug=nan: net.{PLACE} gives nan in its backward, as the gradient of its input, in optimizer step {STEP}, "
        f"micro-batch {MICRO_BATCH}, on rank {rank}; that of its output was finite."
    )


@pytest.mark.slow
def test_of_a_split_module_a_part_may_be_named(tmp_path: Path) -> None:
    # A collective inside it has brought the NaN to the other rank, too, and either may be the first to look.
    place = rf"debug=nan: net\.{re.escape(PLACE)}(\.down)? gives nan in its backward, .* micro-batch {MICRO_BATCH}, on"
    assert re.match(place, line_of(tmp_path, "BreaksBackward", "tensor"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "pipeline"])
def test_where_no_module_makes_it_the_loss_is_named(strategy: str, tmp_path: Path) -> None:
    line = line_of(tmp_path, "BreaksLoss", strategy)
    assert re.search("the gradient of net.head's output is nan, and no module has made it, in optimizer step 2", line)
    assert line.endswith("look at the loss.")


@pytest.mark.slow
def test_a_sound_run_comes_to_its_end(tmp_path: Path) -> None:
    runs = {name: train(tmp_path, *DEEP[:-1], f"run_dir={name}", *words) for name, words in SOUND.items()}
    assert [run.returncode for run in runs.values()] == [0, 0], runs
    watched, bare = (json.loads((tmp_path / name / "record.json").read_text()) for name in SOUND)
    assert watched["results"]["val_loss"] == bare["results"]["val_loss"]
    assert watched["config_hash"] == bare["config_hash"]  # how a run is watched is not what it is


SOUND = {"watched": ["debug=nan"], "bare": []}


@pytest.mark.slow
def test_a_hanging_run_leaves_its_collectives(tmp_path: Path) -> None:
    words = ["strategy=ddp", "debug=flight_recorder", "model._target_=tests.launch.hanging.HangsInTraining"]
    limits = ["launcher.startup_timeout_s=60", "launcher.timeout_s=3"]  # seconds; busy cores may take one from a step
    run = train(tmp_path, *TINY, *words, *limits, "run_dir=run", timeout_s=200)
    assert run.returncode == 1
    folder = tmp_path / "run/flight_recorder"
    assert f"what each rank has sent: {folder}" in run.stdout
    waiting = json.loads((folder / f"rank{1 - HANGING_RANK}.json").read_text())["entries"][-1]
    assert (waiting["profiling_name"], waiting["retired"]) == ("gloo:all_reduce", False)
    assert any(frame["filename"].endswith("launch/worker.py") for frame in waiting["frames"])
    program = "from torch.distributed.flight_recorder.fr_trace import main; main()"
    compared = subprocess.run(
        [sys.executable, "-c", program, str(folder / "dumps"), "--prefix", "rank"],
        env=user_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"missing ranks: {{{HANGING_RANK}}}" in compared.stderr + compared.stdout
