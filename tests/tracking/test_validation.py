"""What a module logs without a word of ranks is of all their samples; what cannot be is named."""

from pathlib import Path

import pytest

from tests.agreement.training import run_job
from tests.tracking.foreign import LogsAlone
from tests.tracking.foreign_jobs import job_of, train_rank
from tests.tracking.runs import run
from tracking.comparison import compare_runs
from tracking.record import Results, RunRecord

DDP = ["trainer.max_steps=1", "strategy=ddp", "launcher.devices=2"]


def validated(folder: Path, kind: type, *words: str, **keys: bool) -> Results:
    job = job_of(kind, folder, *words, **keys)
    run_job(job, train_rank, job)
    return RunRecord.read(folder / "record.json").results


@pytest.mark.parametrize(
    "words",
    [DDP, pytest.param([*DDP[:1], "strategy=2d_pipeline", "strategy.micro_batches=1"], marks=pytest.mark.full)],
    ids=["ddp", "2d_pipeline"],
)
def test_a_metric_that_is_logged_without_sync_dist_is_of_all_ranks_samples(words: list[str], tmp_path: Path) -> None:
    whole = validated(tmp_path / "whole", LogsAlone, "trainer.max_steps=1")
    spread = validated(tmp_path / "spread", LogsAlone, *words)
    assert spread.val_metrics == pytest.approx(whole.val_metrics, rel=1e-5)  # of 7 samples on two ranks, 4 and 3
    assert spread.val_of_one_rank == whole.val_of_one_rank == []


def test_what_ranks_do_not_all_log_is_left_alone_and_named(tmp_path: Path) -> None:
    results = validated(tmp_path, LogsAlone, *DDP, unlike=True, at_end=True)
    assert results.val_of_one_rank == ["val/end", "val/first", "val/loss", "val/most"]
    assert (results.val_metrics["val/end"], results.val_metrics["val/first"]) == (0, 1)


def test_what_is_logged_behind_a_validation_is_named_alone(tmp_path: Path) -> None:
    assert validated(tmp_path, LogsAlone, *DDP, at_end=True).val_of_one_rank == ["val/end"]


def test_a_comparison_warns_of_a_metric_of_one_rank() -> None:
    runs = [run("single"), run("ddp", found={"val_of_one_rank": ["val/end"]})]
    warnings = [doubt.text for doubt in compare_runs(runs).doubts if doubt.fact == "config"]
    assert warnings == ["ddp: val/end is of the first rank's samples alone; log it with sync_dist=True."]
