"""debug=: the module that makes NaN is named under every strategy; collectives are left behind when a run hangs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.failure import first_failure
from tests.agreement.training import job_of, run_job, train_case, train_rank
from tests.launch.command import TINY, user_environment
from tests.launch.hanging import HANGING_RANK
from tests.launch.nan_parts import MICRO_BATCH, PLACE, STEP
from tests.launch.warm import train
from tests.tiers import in_tiers
from tracking.record import RunRecord

# Two micro-batches in each step, also of a pipeline, which has cut `PLACE` to its second rank.
DEEP = [*TINY, "model.net.num_layers=4", "checkpoint.at_end=false"]
STRATEGIES = {
    "single": ["strategy=single"],
    "ddp": ["strategy=ddp", "data.micro_batch_size=2"],
    "zero3": ["strategy=zero3", "data.micro_batch_size=2"],
    "fsdp": ["strategy=fsdp", "data.micro_batch_size=2"],
    "tensor": ["strategy=tensor"],
    "pipeline": ["strategy=pipeline", "strategy.micro_batches=2", "data.micro_batch_size=8"],
    "activation checkpointing": ["strategy=ddp", "data.micro_batch_size=2", "strategy.activation_checkpointing=full"],
}
RANKS = {strategy: 1 if strategy == "single" else 2 for strategy in STRATEGIES}


def words_of(model: str, strategy: str) -> list[str]:
    return [*DEEP, *STRATEGIES[strategy], f"model._target_=tests.launch.nan_parts.{model}", "debug=nan"]


def line_of(folder: Path, model: str, strategy: str) -> str:
    """What a dispatcher would say of a run's ranks."""
    with pytest.raises(AssertionError, match="debug=nan"):
        train_case([*words_of(model, strategy), "evidence=true"], folder)
    failure = first_failure(folder, RANKS[strategy], oom_kills_before=0)
    assert failure is not None
    return failure.line(folder, RANKS[strategy])


def in_forward(strategy: str) -> str:
    return (
        f"debug=nan: net.{PLACE} gives nan in its forward, in optimizer step {STEP}, micro-batch {MICRO_BATCH}, "
        f"on rank {RANKS[strategy] - 1}; its input was finite."
    )


def test_the_line_is_all_that_the_user_sees(tmp_path: Path) -> None:
    run = train(tmp_path, *words_of("BreaksForward", "ddp"), "run_dir=run")
    assert (run.returncode, run.stderr) == (1, f"{in_forward('ddp')}\n")


@pytest.mark.parametrize("strategy", in_tiers([*STRATEGIES], ["zero3"]))
def test_module_that_gives_nan_is_named(strategy: str, tmp_path: Path) -> None:
    assert line_of(tmp_path, "BreaksForward", strategy) == in_forward(strategy)


@pytest.mark.parametrize("strategy", in_tiers([name for name in STRATEGIES if name != "tensor"], ["fsdp", "pipeline"]))
def test_module_whose_backward_gives_nan_is_named(strategy: str, tmp_path: Path) -> None:
    assert line_of(tmp_path, "BreaksBackward", strategy) == (
        f"debug=nan: net.{PLACE} gives nan in its backward, as the gradient of its input, in optimizer step {STEP}, "
        f"micro-batch {MICRO_BATCH}, on rank {RANKS[strategy] - 1}; that of its output was finite."
    )


@pytest.mark.full
def test_of_a_split_module_a_part_may_be_named(tmp_path: Path) -> None:
    # A collective inside it has brought the NaN to the other rank, too, and either may be the first to look.
    place = rf"debug=nan: net\.{re.escape(PLACE)}(\.down)? gives nan in its backward, .* micro-batch {MICRO_BATCH}, on"
    assert re.match(place, line_of(tmp_path, "BreaksBackward", "tensor"))


@pytest.mark.parametrize("strategy", in_tiers(["single", "pipeline"], ["single"]))
def test_where_no_module_makes_it_the_loss_is_named(strategy: str, tmp_path: Path) -> None:
    line = line_of(tmp_path, "BreaksLoss", strategy)
    assert re.search("the gradient of net.head's output is nan, and no module has made it, in optimizer step 2", line)
    assert line.endswith("look at the loss.")


@pytest.mark.parametrize("strategy", in_tiers(["single", "pipeline"], ["single"]))
def test_a_sound_run_comes_to_its_end(strategy: str, tmp_path: Path) -> None:
    for name, words in {"watched": ["debug=nan"], "bare": []}.items():
        job = job_of([*DEEP, *STRATEGIES[strategy], *words], tmp_path / name)
        run_job(job, train_rank, job, None, None)
    watched, bare = (RunRecord.read(tmp_path / name / "record.json") for name in ("watched", "bare"))
    assert watched.results.val_loss == bare.results.val_loss
    assert watched.config_hash == bare.config_hash  # how a run is watched is not what it is


@pytest.mark.full
def test_a_hanging_run_leaves_its_collectives(tmp_path: Path) -> None:
    words = ["strategy=ddp", "debug=flight_recorder", "model._target_=tests.launch.hanging.HangsInTraining"]
    limits = ["launcher.startup_timeout_s=60", "launcher.timeout_s=10"]  # seconds; busy cores may take some from a step
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
