"""scripts/compare.py on what sweeps really leave: whole runs, broken ones, and very many."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.command import REPOSITORY, TINY, start, train, user_environment, wait_for
from tests.tracking.runs import measured, run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "scripts/compare.py")
GIB = 2**30
MB = 10**6


def compare(cwd: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=cwd, env=user_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(page: Path) -> dict[str, Any]:
    """The comparison that a page holds."""
    found = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_failed_diverged_killed_and_duplicated_runs_are_shown_for_what_they_are(tmp_path: Path) -> None:
    short = [*TINY, "trainer.log_every_steps=1", "strategy=single"]
    sweep = train(
        tmp_path, "-m", *short, "seed=1,1", "optimizer.lr=0.001,1e20", "hydra.sweep.dir=jobs", timeout_s=240
    )  # fmt: skip
    assert sweep.returncode == 1 and "compared in" in sweep.stdout
    broken = train(tmp_path, *short, "model._target_=tests.launch.failing.HoldsNoReset", "run_dir=jobs/4")
    assert broken.returncode == 1
    killed = start(tmp_path, *short, "trainer.max_steps=1000000", "run_dir=jobs/5")
    metrics = tmp_path / "jobs/5/metrics.csv"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 100, "the first steps")
    killed.kill()
    killed.wait(timeout=30)

    said = compare(tmp_path, "jobs")
    runs = shown(tmp_path / "jobs/compare.html")["runs"]
    states = {run["folder"]: (run["label"], run["state"]) for run in runs}
    assert states == {
        "0": ("single seed=1, repeat 1", "completed"),
        "1": ("single", "failed"),
        "2": ("single seed=1, repeat 2", "completed"),
        "3": ("single", "failed"),
        "4": ("single", "failed"),
        "5": ("single", "lost"),
    } or [state for _, state in states.values()].count("completed") == 2, states
    errors = {run["folder"]: run["error"] for run in runs}
    assert "nan" in errors["1"] or "inf" in errors["1"]
    assert "reset_parameters" in errors["4"] and "dispatcher" in errors["5"]
    assert [run["curve"]["steps"] != [] for run in runs if run["folder"] == "5"] == [True]  # as far as it came
    assert "reset_parameters" in said


def write_many(folder: Path, count: int, steps: int) -> None:
    """Run folders with records, and as many rows of metrics as `steps`."""
    text = ["step,train/loss,val/loss,perf/step_ms,perf/tokens_per_s,mem/peak_gib,optim/lr,optim/grad_norm"]
    noise = random.Random(1)
    for step in range(1, steps + 1):
        loss, speed = 4 * math.exp(-step / 3000) + noise.random() / 10, 1000 + noise.random()
        text.append(f"{step},{loss:.6f},,{1e5 / speed:.3f},{speed:.3f},1.0,0.001,{noise.random():.6f}")
    for number in range(count):
        job = folder / str(number)
        job.mkdir(parents=True)
        made = run(f"s{number % 10}", ranks=2, seed=number // 10, found=measured())
        assert made.record is not None
        made.record.write(job / "record.json")
        (job / "metrics.csv").write_text("\n".join(text) + "\n")


def test_two_hundred_runs_of_ten_thousand_steps_fit_in_a_page_and_in_memory(tmp_path: Path) -> None:
    write_many(tmp_path / "jobs", count=200, steps=10_000)
    process = subprocess.Popen([sys.executable, SCRIPT, "jobs"], cwd=tmp_path, env=user_environment(), stdout=-3)
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert used.ru_maxrss * 1024 < GIB
    page = tmp_path / "jobs/compare.html"
    assert page.stat().st_size < 15 * MB
    comparison = shown(page)
    assert len(comparison["runs"]) == 200 and len(comparison["series"]) == 10
    curve = comparison["series"][0]["curve"]
    assert curve["logged"] == 10_000
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 10_000)
    shutil.rmtree(tmp_path / "jobs")
