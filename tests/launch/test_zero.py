"""ZeRO as a user runs it: from the command line to the record."""

import json
from pathlib import Path

import pytest

from tests.launch.command import TINY
from tests.launch.warm import train
from tests.tiers import in_tiers
from tracking.record import RunRecord


@pytest.mark.full
def test_run_under_deepspeed_is_a_run_like_any_other(tmp_path: Path) -> None:
    run = train(tmp_path, "strategy=zero3_offload", *TINY, "run_dir=run")
    assert (run.returncode, run.stderr) == (0, "")
    # DeepSpeed has much to say; none of it is for the terminal.
    assert [line for line in run.stdout.splitlines() if "[WARNING]" in line or "[INFO]" in line] == []
    record = RunRecord.read(tmp_path / "run/record.json")
    assert (record.strategy, record.world_size, record.results.steps) == ("zero3_offload", 2, 4)
    used = json.loads((tmp_path / "run/deepspeed.json").read_text())
    assert used["zero_optimization"]["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(
    "words", in_tiers([["strategy=zero3_nvme"], ["strategy=single", "optimizer=cpu_adamw"]], [["strategy=zero3_nvme"]])
)
def test_missing_compiler_is_one_line_before_anything_starts(tmp_path: Path, words: list[str]) -> None:
    folder = str(tmp_path / "extensions")
    run = train(tmp_path, *words, *TINY, "run_dir=run", CXX="/no/such/compiler", TORCH_EXTENSIONS_DIR=folder)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert "/no/such/compiler" in run.stderr
    assert "apt install g++" in run.stderr
    assert not (tmp_path / "run").exists()
