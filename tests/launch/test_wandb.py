"""What the team sees of a run: read back from the file that `wandb sync` would upload."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.command import TINY, train, user_environment
from tracking.record import RunRecord


def inspect(run_dir: Path, *flags: str) -> str:
    wandb = Path(sys.executable).with_name("wandb")
    (offline,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(wandb), "leet", "inspect", "--json", *flags, str(offline)]
    return subprocess.run(command, env=user_environment(), capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_offline_run_holds_group_job_type_config_and_metrics(tmp_path: Path) -> None:
    overrides = [word for word in TINY if word != "logger=none"]
    run = train(tmp_path, "strategy=ddp", *overrides, "trainer.log_every_steps=1", "logger.group=night", "run_dir=run")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    record = RunRecord.read(tmp_path / "run/record.json")
    entries: list[dict[str, Any]] = [json.loads(line) for line in inspect(tmp_path / "run").splitlines()]

    (made,) = [entry["run"] for entry in entries if entry["type"] == "run"]
    assert (made["run_group"], made["job_type"], made["project"]) == ("night", "ddp", "concord")
    assert made["run_id"] == record.run_id
    resolved = yaml.safe_load((tmp_path / "run/resolved.yaml").read_text())
    logged = made["config"]["update"]
    assert {key: logged[key] for key in resolved} == json.loads(json.dumps(resolved))

    rows = [entry["history"]["item"] for entry in entries if entry["type"] == "history"]
    train_rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in train_rows] == [256, 512, 768, 1024]
    assert all({"mem/peak_gib", "optim/lr", "optim/grad_norm"} <= row.keys() for row in train_rows)
    assert {"perf/step_ms", "perf/tokens_per_s", "perf/mfu"} <= train_rows[-1].keys()
    assert [row["val/loss"] for row in rows if "val/loss" in row] == [pytest.approx(record.results.val_loss)]

    summary = json.loads(inspect(tmp_path / "run", "--summary"))["summary"]
    results = json.loads(record.results.model_dump_json())
    assert {key: summary.get(f"record/{key}") for key in results} == results
