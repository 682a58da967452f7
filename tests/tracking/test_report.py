"""Runs are found where they lie, and shown side by side with nothing cut."""

import io
from pathlib import Path

import pytest

from tests.tracking.examples import record, results
from tracking.report import print_runs
from tracking.sources import Run, read_run, read_runs
from tracking.status import ended, running


def job(folder: Path, *, error: str | None = None, with_record: bool = True, name: str = "first") -> None:
    folder.mkdir(parents=True)
    if with_record:
        record(name=name).write(folder / "record.json")
    ended(running(name, "ddp"), "failed" if error else "completed", error=error).write(folder)


def lines(runs: list[Run]) -> list[str]:
    stream = io.StringIO()
    print_runs(runs, stream)
    return stream.getvalue().splitlines()


def row(runs: list[Run], name: str) -> list[str]:
    return next(line for line in lines(runs) if line.split()[:1] == [name]).split()


def test_a_run_folder_gives_its_run(tmp_path: Path) -> None:
    job(tmp_path / "run")
    (run,) = read_runs(tmp_path / "run")
    assert (run.name, run.strategy, run.state, run.record) == ("first", "ddp", "completed", record())


def test_a_sweep_gives_its_jobs_by_number(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        job(tmp_path / str(number), name=f"job{number}")
    job(tmp_path / ".earlier" / "2.0")
    (tmp_path / "notes").mkdir()
    assert [run.name for run in read_runs(tmp_path)] == ["job0", "job2", "job10"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run; give a run's folder"):
        read_runs(tmp_path)
    with pytest.raises(ValueError, match="holds no run"):
        read_runs(tmp_path / "nowhere")


def test_a_failed_job_is_a_run_with_its_error(tmp_path: Path) -> None:
    job(tmp_path / "0", error="rank 1: ValueError: [no] such file", with_record=False)
    run = read_run(tmp_path / "0")
    assert (run.state, run.record) == ("failed", None)
    assert "failed: rank 1: ValueError: [no] such file" in "\n".join(lines([run]))


def test_a_job_whose_dispatcher_vanished_is_lost(tmp_path: Path) -> None:
    me = running("x", "ddp")
    assert me.dispatcher is not None
    host, pid, started = me.dispatcher
    me.write(tmp_path)
    assert read_run(tmp_path).state == "running"
    me.model_copy(update={"dispatcher": (host, pid, started - 1)}).write(tmp_path)  # its pid was given to another
    assert read_run(tmp_path).state == "lost"
    (tmp_path / "status.json").unlink()
    (tmp_path / "resolved.yaml").touch()
    assert read_run(tmp_path).state == "lost"


def test_a_damaged_record_is_a_failed_run_that_says_so(tmp_path: Path) -> None:
    job(tmp_path / "0")
    (tmp_path / "0" / "record.json").write_text("{")
    run = read_run(tmp_path / "0")
    assert run.state == "failed" and run.error is not None and "is damaged" in run.error


def test_the_table_holds_the_record_s_figures() -> None:
    run = Run(name="first", strategy="ddp", state="completed", record=record())
    assert row([run], "first") == [
        "first", "ddp", "2", "2.2500", "2.5000", "12,346", "82.9", "(101.5)", "31.2%", "0.75", "21.5", "completed"
    ]  # fmt: skip


def test_what_was_not_measured_is_a_dash() -> None:
    unmeasured = results(val_loss=None, tokens_per_s=None, step_ms_p50=None, step_ms_p95=None, mfu=None)
    run = Run(name="first", strategy="ddp", state="completed", record=record(results=unmeasured))
    assert row([run], "first")[3:9] == ["2.2500", "-", "-", "-", "-", "0.75"]


def test_plain_text_is_the_same_everywhere_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * 3000
    runs = [
        Run(name=long, strategy="ddp", state="failed", error="because " + "y" * 3000),
        Run(name="first", strategy="ddp", state="completed", record=record()),
    ]
    plain = lines(runs)
    assert any(long in line and "y" * 3000 in line for line in plain)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert lines(runs) == plain
    assert "\x1b" not in "".join(plain)
