"""What rank 0 does with W&B from start to end, in a process that is forked where Lightning is already imported.

Each line on stdin is a run as JSON: arguments, environment, folder and output files. Its exit code is the answer.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.tracking.examples import record
from tests.tracking.wandb_use import CERTIFICATE, EVENT, METRICS
from tracking.wandb_config import WandbConfig
from tracking.wandb_logger import RunLogger, finish_wandb, log_record
from tracking.wandb_run import start_run


def run(run_dir: Path, mode: str, accident: str) -> None:
    start = time.monotonic()
    made = start_run(
        WandbConfig.model_validate({"mode": mode, "tags": ["from-config"]}),
        run_dir=run_dir,
        job_type="ddp",
        name="first",
        group="sweep-7",
        tags=["from-caller"],
        run_id="run1",
        run_config={
            "seed": 1,
            "data": {"tokenizer": "bytes", "hf_token": "SECRET-config", "tokens_per_sample": 64},
            "mirror": "https://me:SECRET-url@example.com/data?token=SECRET-query",
        },
        finish_timeout_s=3,
    )
    print(f"start {time.monotonic() - start:.1f}")
    if made is None:
        return
    logger = RunLogger(made, save_dir=run_dir, tokens_per_step=1024)
    logger.log_hyperparams({"width": 8, "password": "SECRET-hyperparameter"})
    logger.log_metrics({"train/loss": 3.5, "perf/tokens_per_s": 1000.0}, 1)
    logger.log_metrics({"val/loss": 2.0, "epoch": 0}, 1)
    if accident == "run fails early":
        finish_wandb([logger], ok=False)
        return
    if accident == "server dies":
        time.sleep(1)
        os.kill(int(os.environ["SERVER_PID"]), signal.SIGKILL)
    for child in psutil.Process().children():
        if accident == "service dies":
            child.kill()
            time.sleep(0.5)
        if accident == "service hangs":
            child.suspend()
    logger.log_metrics({"train/loss": 1.25}, 2)
    logger.log_metrics({"val/loss": 2.5, "epoch": 0}, 2)
    if accident == "numbers fail":
        logger.log_metrics({"val/loss": math.nan, "perf/tokens_per_s": math.inf}, 3)
        logger.log_metrics({"val/loss": 1.5, "perf/tokens_per_s": 3000.0}, 4)
    print("SECRET-print")
    (run_dir / "metrics.csv").write_text(METRICS)
    made_record = record(group="sweep-7")
    made_record.write(run_dir / "record.json")
    (run_dir / "trace.json").write_text(json.dumps({"traceEvents": [EVENT]}))
    (run_dir / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (run_dir / "resolved.yaml").write_text("hf_token: SECRET-resolved")
    log_record([logger], made_record, run_dir)
    start = time.monotonic()
    finish_wandb([logger], ok=accident != "run fails")
    print(f"finish {time.monotonic() - start:.1f}")


def become(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["train.py", *request["arguments"]]


print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        become(request)
        run(Path(request["arguments"][0]), *request["arguments"][1:3])
        break  # and leave as any program does, through its exit handlers
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
