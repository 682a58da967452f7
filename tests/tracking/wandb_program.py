"""What rank 0 does with W&B, from start to end: argv is the run folder, the mode, and what happens half-way."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

from tests.tracking.examples import record
from tracking.wandb_config import WandbConfig
from tracking.wandb_logger import finish_wandb, log_record, start_wandb

run_dir, mode, accident = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
start = time.monotonic()
logger = start_wandb(
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
    tokens_per_step=1024,
    finish_timeout_s=3,
)
print(f"start {time.monotonic() - start:.1f}")
if logger is None:
    sys.exit()
logger.log_hyperparams({"width": 8, "password": "SECRET-hyperparameter"})
logger.log_metrics({"train/loss": 3.5, "perf/tokens_per_s": 1000.0}, 1)
logger.log_metrics({"val/loss": 2.0, "epoch": 0}, 1)
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
print("SECRET-print")
log_record([logger], record())
start = time.monotonic()
finish_wandb([logger], ok=accident != "run fails")
print(f"finish {time.monotonic() - start:.1f}")
