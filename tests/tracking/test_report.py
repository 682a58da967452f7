"""Runs are found where they lie, and shown side by side with nothing cut."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweep import print_sweep
from tests.tracking.examples import record, results
from tests.tracking.runs import run as made
from tracking.comparison import compare_runs
from tracking.record import ROOT
from tracking.report import print_comparison, print_runs
from tracking.sources import Run, read_run, read_runs
from tracking.status import ended, running

NAMES = ("single", "ddp")


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


def test_the_best_of_a_column_is_marked_and_equal_ones_are_not() -> None:
    comparison = compare_runs([made("single", tokens_per_s=1000, peak_gib=2.0), made("ddp", tokens_per_s=1500)])
    stream = io.StringIO()
    print_comparison(comparison, stream)
    single, ddp = (next(line for line in stream.getvalue().splitlines() if f"  {name} " in line) for name in NAMES)
    assert "*1,500" in ddp and "*1.50" in ddp and "*1.00" in ddp
    assert single.count("*") == 0 and "*2.0000" not in ddp  # both losses are 2


def test_conclusions_and_warnings_follow_the_table() -> None:
    stream = io.StringIO()
    print_comparison(compare_runs([made("single"), made("ddp", tokens_per_s=1500, ranks=2)]), stream)
    assert "ddp is the fastest at 1,500 tokens/s" in stream.getvalue()
    assert "warning: ranks are processes that share 2 cores" in stream.getvalue()


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compare_prints_the_table_and_the_page_s_path(tmp_path: Path) -> None:
    for number in range(2):
        job(tmp_path / "sweep" / str(number), name="ddp")
    done = compare(tmp_path / "sweep")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "ddp, repeat 2" in done.stdout
        and done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'sweep' / 'compare.html'}"
    )
    assert "ddp, repeat 2" in (tmp_path / "sweep" / "compare.html").read_text()
    assert compare(tmp_path / "sweep", "--out", tmp_path / "page.html").returncode == 0
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: folder"),
        (["nowhere"], "nowhere holds no run"),
        (["wandb:me/group"], "wandb:me/group is no group of runs"),
        (["run", "--loss", "low"], "invalid float value: 'low'"),
        (["run", "--out", "no/such/page.html"], "No such file or directory; give another --out or --png."),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    job(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    done = compare(*arguments)
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_sweep_leaves_a_page_and_does_not_fail_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job(tmp_path / "0")
    assert print_sweep(tmp_path) == 0
    assert f"compared in {tmp_path / 'compare.html'}" in capsys.readouterr().out
    assert (tmp_path / "compare.html").exists()
    monkeypatch.setitem(sys.modules, "tracking.page", None)  # as if plotly were not there
    assert print_sweep(tmp_path) == 0
    assert "compare.html was not written: ModuleNotFoundError" in capsys.readouterr().err


def test_a_sweep_s_table_needs_no_plotting_library() -> None:
    code = "import sys, launch.sweep; print(sorted({'plotly', 'matplotlib', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
