"""The real W&B client in a process of its own, a server that it can reach, and what W&B's own tools read back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "01234567"  # 40 characters, as W&B's keys have
WANDB = Path(sys.executable).with_name("wandb")

# What the program leaves in its run's folder.
METRICS = "step,train/loss,perf/tokens_per_s,val/loss\n1,3.5,1000.0,\n1,,,2.0\n2,1.25,,\n2,,,2.5\n"
EVENT = {"ph": "X", "pid": 1, "tid": 0, "cat": "forward", "name": "forward", "ts": 1.5, "dur": 2.0}
CERTIFICATE = {
    "verdict": "agrees",
    "strategy": "ddp",
    "world_size": 2,
    "model": "gpt_tiny",
    "data": "text",
    "precision": "fp32",
    "steps": 4,
}


def environment(home: Path, **variables: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return clean | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | variables


@dataclass(frozen=True)
class Done:
    """What a program left behind."""

    stdout: str
    stderr: str
    wall_s: float


class Program(Protocol):
    def __call__(self, folder: Path, mode: str = "auto", accident: str = "none", **variables: str) -> Done: ...


@contextmanager
def programs(base: Path) -> Iterator[Program]:
    """Runs the program in a git repository whose remote holds a secret; in the end, sees that no process is left."""
    command = [sys.executable, "-m", "tests.tracking.wandb_program"]
    with subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as warm:
        assert warm.stdin is not None and warm.stdout is not None
        assert warm.stdout.readline() == "ready\n"
        yield partial(run_program, warm)
        warm.stdin.close()
    assert left_over(base) == []


def run_program(warm: Popen[str], folder: Path, mode: str = "auto", accident: str = "none", **variables: str) -> Done:
    for name in ("home", "run", "repository"):
        (folder / name).mkdir(exist_ok=True)
    git = ["git", "-C", str(folder / "repository")]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://me:SECRET-git@example.com/x.git"], check=True)
    outputs = {name: str(folder / name) for name in ("stdout", "stderr")}
    request = {
        "arguments": [str(folder / "run"), mode, accident, "k=SECRET-arg"],
        "env": environment(folder / "home", **variables),
        "cwd": str(folder / "repository"),
        **outputs,
    }
    assert warm.stdin is not None and warm.stdout is not None
    start = time.monotonic()
    print(json.dumps(request), file=warm.stdin, flush=True)
    exit_code = warm.stdout.readline().strip()
    wall_s = time.monotonic() - start
    done = Done(wall_s=wall_s, **{name: Path(path).read_text() for name, path in outputs.items()})
    assert exit_code == "0", done.stderr
    return done


def left_over(base: Path) -> list[str]:
    """What is still alive, 10 s later at the latest, of the processes whose HOME lies under `base`."""
    deadline = time.monotonic() + 10
    while (found := living(base)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def living(base: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("HOME", "")
            if process.status() != psutil.STATUS_ZOMBIE and Path(home).is_relative_to(base):
                found.append(f"{home}: {process.cmdline()}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def leet(folder: Path, *words: str) -> str:
    """What W&B's own reader tells of the only run in `folder`."""
    (file,) = (folder / "run" / "wandb").glob("*run-*/*.wandb")
    command = [str(WANDB), "leet", "inspect", *words, "--json", str(file)]
    env = environment(folder / "home")
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True).stdout


@cache
def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads(leet(folder, "--summary"))


@cache
def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in leet(folder).splitlines()]


@contextmanager
def serve(uploads: Path, status: int = 200) -> Iterator[dict[str, str]]:
    """A living server, as the variables that lead a client to it; what it is sent it writes to `uploads`."""
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py")), str(uploads), str(status)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        host = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        try:
            yield {"WANDB_BASE_URL": host, "WANDB_API_KEY": KEY, "SERVER_PID": str(process.pid)}
        finally:
            process.kill()
