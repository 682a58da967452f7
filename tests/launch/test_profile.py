"""profile=: a trace of the steps that were asked for, on every rank, and of no others; GPU memory on a GPU."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from tests.launch.command import TINY
from tests.launch.warm import train
from tracking.record import RunRecord

STEPS = ["trainer.max_steps=9", "checkpoint.at_end=false", "run_dir=run"]


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "pipeline"])
def test_every_rank_traces_the_steps_asked_for(strategy: str, tmp_path: Path) -> None:
    words = ["profile=torch", "profile.first_step=6", "profile.shapes=true", "trainer.log_every_steps=1"]
    run = train(tmp_path, *TINY, *STEPS, f"strategy={strategy}", *words, timeout_s=200)
    assert run.returncode == 0, run.stderr
    assert f"profile: {tmp_path}/run/profile/rank0.json.gz (and of 1 more)" in run.stdout
    for rank in range(2):
        with gzip.open(tmp_path / f"run/profile/rank{rank}.json.gz") as file:
            trace = json.load(file)
        names = {event["name"] for event in trace["traceEvents"]}
        assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#6", "ProfilerStep#7"}
        assert "aten::mm" in names or "aten::addmm" in names
        assert any("Input Dims" in event.get("args", {}) for event in trace["traceEvents"])
        assert trace["distributedInfo"]["rank"] == rank
    assert "in which a profiler ran" in RunRecord.read(tmp_path / "run/record.json").results.warmup_rule
    # Steps 1 and 2 warm up, 3 and 4 are traced, 5 warms the profiler up: only 8 and 9 are as they ever are.
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    timed = [
        int(cells[header.index("step")])
        for cells in (row.split(",") for row in rows[1:])
        if cells[header.index("perf/step_ms")]
    ]
    assert timed == [8, 9]


@pytest.mark.full
def test_a_run_that_fails_leaves_what_it_has_seen(tmp_path: Path) -> None:
    words = ["profile=torch", "profile.first_step=2", "profile.steps=3", "trainer.trace_steps=0", "debug=nan"]
    model = ["model.net.num_layers=4", "model._target_=tests.launch.nan_parts.BreaksForward"]
    assert train(tmp_path, *TINY, *STEPS, *words, *model).returncode == 1
    with gzip.open(tmp_path / "run/profile/rank0.json.gz") as file:
        assert any(event["name"] == "ProfilerStep#2" for event in json.load(file)["traceEvents"])


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_snapshot_has_stacks(tmp_path: Path) -> None:
    tiny = [word for word in TINY if not word.startswith("launcher.")]
    run = train(
        tmp_path, *tiny, *STEPS, "profile=memory", "trainer.trace_steps=0", CUDA_VISIBLE_DEVICES="0", timeout_s=200
    )
    assert run.returncode == 0, run.stderr
    snapshot = pickle.loads((tmp_path / "run/profile/rank0.pickle").read_bytes())
    assert any(event["frames"] for event in snapshot["device_traces"][0])


@pytest.mark.full
def test_a_profile_of_traced_steps_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, *TINY, *STEPS, "profile=torch", "profile.first_step=5")
    assert run.returncode == 2
    assert "step 4 is timed for trace.json, which a profiler would disturb; set profile.first_step=6" in run.stderr
    assert train(tmp_path, *TINY, *STEPS[:-1], "run_dir=next", "profile=torch", "profile.first_step=6").returncode == 0
