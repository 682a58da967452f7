"""What the team sees of a run and of a sweep: read back from the files that `wandb sync` would upload."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.compose import compose
from launch.schema import validate
from launch.sweep import print_sweep
from tests.launch.command import REPOSITORY, TINY, user_environment
from tests.launch.warm import train
from tests.tracking.examples import record
from tracking.record import RunRecord
from tracking.sources import collect
from tracking.status import RunStatus, State

SMALL = [word for word in TINY if word != "logger=none"]
SWEEP = REPOSITORY / "conf/wandb_sweep.yaml"

# What W&B's own agent does with a run of a sweep that its server has asked it for.
AGENT = """
import json, sys
from wandb.wandb_agent import Agent
command = json.loads(sys.argv[1])
agent = Agent(api=None, queue=None)
agent._sweep_command = command.pop("command")
agent._command_run(command)
sys.exit(agent._run_processes[command["run_id"]].wait())
"""


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """All that the offline run in `folder` has written."""
    return [json.loads(line) for line in inspect(folder).splitlines()]


def inspect(folder: Path, *flags: str) -> str:
    wandb = Path(sys.executable).with_name("wandb")
    (offline,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(wandb), "leet", "inspect", "--json", *flags, str(offline)]
    return subprocess.run(command, env=user_environment(), capture_output=True, text=True, check=True).stdout


def one(entries: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (entry,) = [entry[kind] for entry in entries if entry["type"] == kind]
    return entry


@pytest.mark.full
def test_an_offline_run_is_the_record_its_config_and_every_row_of_its_metrics(tmp_path: Path) -> None:
    words = ["trainer.log_every_steps=1", "trainer.val_every_steps=2", "logger.group=night", "run_dir=run"]
    run = train(tmp_path, "strategy=ddp", *SMALL, *words)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    run_dir = tmp_path / "run"
    result = RunRecord.read(run_dir / "record.json")
    entries = entries_of(run_dir)

    made = one(entries, "run")
    assert (made["run_group"], made["job_type"], made["project"]) == (result.group, result.strategy, "concord")
    assert (made["run_id"], result.group, result.strategy) == (result.run_id, "night", "ddp")
    resolved = yaml.safe_load((run_dir / "resolved.yaml").read_text())
    logged = made["config"]["update"]
    assert {key: logged[key] for key in resolved} == json.loads(json.dumps(resolved))

    rows = [entry["history"]["item"] for entry in entries if entry["type"] == "history"]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3, 4}
    assert [row["tokens"] for row in rows] == [256 * step for step in steps]
    times = [row["time_s"] for row in rows]
    assert times == sorted(times) and times[0] > 0 and times[-1] <= result.results.wall_s - result.results.startup_s + 1
    with (run_dir / "metrics.csv").open(newline="") as file:
        kept = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    assert len(kept) == 6  # four of training, two of validation
    assert [without(row, "tokens", "time_s") for row in rows] == [without(row, "epoch") for row in kept]

    summary = json.loads(inspect(run_dir, "--summary"))["summary"]
    results = json.loads(result.results.model_dump_json())
    assert {key: summary.get(f"record/{key}") for key in results} == results
    assert summary["val/loss"]["min"] == min(row["val/loss"] for row in kept if "val/loss" in row)
    speeds = [row["perf/tokens_per_s"] for row in kept if "perf/tokens_per_s" in row]
    assert summary["perf/tokens_per_s"]["mean"] == pytest.approx(sum(speeds) / len(speeds))

    (files,) = run_dir.glob("wandb/offline-run-*/files")
    for name in ("record.json", "trace.json"):
        assert (files / name).read_bytes() == (run_dir / name).read_bytes()


def without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_") and key not in keys}


@pytest.mark.full
def test_a_sweep_logs_its_page_as_an_artifact_of_its_group(tmp_path: Path) -> None:
    run = train(tmp_path, "-m", "strategy=single", *SMALL, "seed=1,2", "logger.group=night", "hydra.sweep.dir=sweep")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    entries = entries_of(tmp_path / "sweep")
    made = one(entries, "run")
    assert (made["run_group"], made["job_type"], made["display_name"]) == ("night", "compare", "night")
    artifact = one(entries, "artifact")
    assert (artifact["name"], artifact["type"]) == ("compare-night", "comparison")
    (content,) = artifact["manifest"]["contents"]
    assert content["path"] == "compare.html"
    assert Path(content["local_path"]).read_bytes() == (tmp_path / "sweep/compare.html").read_bytes()
    assert len(collect([str(tmp_path / "sweep")])) == 2


@pytest.mark.parametrize(("state", "mode"), [("interrupted", "offline"), ("failed", "disabled")])
def test_a_sweep_that_is_interrupted_or_not_in_w_and_b_logs_nothing(tmp_path: Path, state: State, mode: str) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        record(name=name, config={"logger": {"mode": mode}}).write(tmp_path / name / "record.json")
    RunStatus(name="1", strategy="ddp", state=state, started=0.0).write(tmp_path / "1")
    assert print_sweep(tmp_path) == 1
    assert (tmp_path / "compare.html").exists() and not (tmp_path / "wandb").exists()


def test_all_that_the_sweep_of_w_and_b_may_choose_can_be_composed_and_is_no_choice_of_ours(tmp_path: Path) -> None:
    parameters = yaml.safe_load(SWEEP.read_text())["parameters"]
    for key, choices in parameters.items():
        for value in choices["values"]:
            validate(compose([f"{key}={value}", f"run_dir={tmp_path}"]))
    assert SWEEP.stem not in train(tmp_path, "--help").stdout


@pytest.mark.full
def test_a_sweep_of_w_and_b_runs_against_train(tmp_path: Path) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep["program"] == "train.py" and (REPOSITORY / sweep["program"]).is_file()
    words = dict(word.split("=") for word in SMALL) | {"run_dir": str(tmp_path / "run")}
    chosen = {key: choices["values"][0] for key, choices in sweep["parameters"].items()}
    command = {
        "command": sweep["command"],
        "program": sweep["program"],
        "run_id": "run7",
        "args": {key: {"value": value} for key, value in (words | chosen).items()},
    }
    env = user_environment() | {
        "WANDB_SWEEP_ID": "sweep5",
        "WANDB_PROJECT": "theirs",
        "WANDB_DIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    arguments = [sys.executable, "-c", AGENT, json.dumps(command)]
    done = subprocess.run(arguments, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = RunRecord.read(tmp_path / "run/record.json")
    made = one(entries_of(tmp_path / "run"), "run")
    assert (made["run_id"], made["sweep_id"], made["run_group"]) == ("run7", "sweep5", "sweep5")
    assert (result.run_id, result.group) == ("run7", "sweep5")
    assert result.strategy == chosen["strategy"]
    assert result.config["optimizer"]["lr"] == chosen["optimizer.lr"]
    # W&B has the sweep's choices where its charts of parameters look for them, and the whole config besides.
    assert {key: made["config"]["update"][key] for key in chosen} == chosen
    assert made["config"]["update"]["resolved"]["strategy"]["name"] == chosen["strategy"]
