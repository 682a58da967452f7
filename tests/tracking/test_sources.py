"""A run's history, trace and certificate are read with it; what cannot be read is a note, not a failure."""

import json
from pathlib import Path

import pytest

from tests.tracking.examples import record
from tracking.history import column_of
from tracking.sources import collect, read_run

EVENT = {"ph": "X", "pid": 1, "tid": 0, "cat": "forward", "name": "forward", "ts": 1.5, "dur": 2.0}


def write(folder: Path, text: str = "step,train/loss,val/loss\n10,4.0,\n20,3.0,\n20,,3.5\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record(name=folder.name).write(folder / "record.json")
    (folder / "metrics.csv").write_text(text)
    return folder


def test_rows_of_one_step_are_one_row(tmp_path: Path) -> None:
    assert read_run(write(tmp_path / "a")).history == {
        "train/loss": column_of({10: 4.0, 20: 3.0}),
        "val/loss": column_of({20: 3.5}),
    }


def test_later_attempts_override_the_steps_that_they_repeat(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "step,train/loss\n30,3.0\n40,2.0\n")
    for number, rows in (("1", "10,9.0\n20,9.0\n30,9.0\n"), ("2", "20,8.0\n25,8.0\n"), ("10", "25,7.0\n30,7.0\n")):
        (folder / "attempts" / number).mkdir(parents=True)
        (folder / "attempts" / number / "metrics.csv").write_text(f"step,train/loss\n{rows}")
    assert list(read_run(folder).history["train/loss"].values) == [9.0, 8.0, 7.0, 3.0, 2.0]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_trace_is_read_in_both_of_chrome_s_forms(tmp_path: Path, wrapped: bool) -> None:
    folder = write(tmp_path / "a")
    events = [{"ph": "M", "name": "process_name", "pid": 0}, EVENT | {"args": {"micro_batch": 3}}]
    (folder / "trace.json").write_text(json.dumps({"traceEvents": events} if wrapped else events))
    (event,) = read_run(folder).trace
    assert (event.rank, event.category, event.start, event.duration) == (1, "forward", 1.5, 2.0)
    assert event.details == {"micro_batch": 3}


def test_a_certificate_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    content = {
        "verdict": "disagrees",
        "strategy": "ddp",
        "world_size": 2,
        "model": "m",
        "data": "d",
        "precision": "fp32",
    }
    (folder / "certificate.json").write_text(json.dumps(content | {"steps": 4, "checks": []}))
    verdict = read_run(folder).verdict
    assert verdict is not None and verdict.verdict == "disagrees"


def test_half_a_last_row_is_left_out(tmp_path: Path) -> None:
    history = read_run(write(tmp_path / "a", "step,train/loss,val/loss\n10,4.0,\n20,3.")).history
    assert history == {"train/loss": column_of({10: 4.0})}


def test_damaged_files_are_notes(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "train/loss\n4.0\n")
    (folder / "trace.json").write_text('[{"ph": "X"}]')
    (folder / "certificate.json").write_text('{"verdict": "perhaps"}')
    run = read_run(folder)
    assert run.state == "completed" and not run.history and not run.trace and run.verdict is None
    assert [note.split(" ")[0].rpartition("a/")[2] for note in run.notes] == [
        "metrics.csv",
        "trace.json",
        "certificate.json",
    ]


def test_each_run_is_collected_once_in_the_order_given(tmp_path: Path) -> None:
    for name in ("0", "1", "10", "2"):
        write(tmp_path / "sweep" / name)
    write(tmp_path / "alone")
    runs = collect([str(tmp_path / "alone"), str(tmp_path / "sweep"), str(tmp_path / "sweep" / "1")])
    assert [run.name for run in runs] == ["alone", "0", "1", "2", "10"]


def test_a_source_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wandb:me/group is no group of runs"):
        collect(["wandb:me/group"])
    with pytest.raises(ValueError, match="holds no run"):
        collect([str(tmp_path)])
