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

from tests.launch.command import REPOSITORY, TINY, user_environment, wait_for
from tests.launch.warm import start, train
from tests.tracking.runs import measured, run

pytestmark = pytest.mark.full
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
    found = re.search(
        r'<script type="application/json" id="comparison">(.*?)</script>', page.read_text(), flags=re.DOTALL
    )
    assert found
    return dict(json.loads(found[1]))


def test_failed_diverged_killed_and_duplicated_runs_are_shown_for_what_they_are(tmp_path: Path) -> None:
    short = [*TINY, "trainer.log_every_steps=1", "strategy=single"]
    jobs = ["-m", *short, "seed=1,1", "optimizer.lr=0.001,1e20", "hydra.sweep.dir=jobs"]
    sweep = train(tmp_path, *jobs, timeout_s=240)
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
    found = {run["folder"]: run for run in runs}
    assert {folder: (run["label"], run["state"]) for folder, run in found.items()} == {
        "0": ("single x 1, repeat 1", "completed"),
        "1": ("single in 1", "failed"),
        "2": ("single x 1, repeat 2", "completed"),
        "3": ("single in 3", "failed"),
        "4": ("single in 4", "failed"),
        "5": ("single in 5", "lost"),
    }
    assert "the loss of rank 0 is nan in optimizer step 2" in found["1"]["error"]
    assert "reset_parameters" in found["4"]["error"]
    assert found["5"]["error"] == "its dispatcher ended without a last word"
    assert [len(found[folder]["curve"]["steps"]) > 0 for folder in "0145"] == [True, True, False, True]
    assert "reset_parameters" in said and "dispatcher" in said


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
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "jobs"], cwd=tmp_path, env=user_environment(), stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)  # which tells how much memory it needed
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_maxrss * 1024 < GIB
    page = tmp_path / "jobs/compare.html"
    assert page.stat().st_size < 15 * MB
    comparison = shown(page)
    assert len(comparison["runs"]) == 200 and len(comparison["series"]) == 10
    curve = comparison["series"][0]["curve"]
    assert curve["logged"] == 10_000
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 10_000)
    shutil.rmtree(tmp_path / "jobs")
