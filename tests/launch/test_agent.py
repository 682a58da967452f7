"""The agent starts ranks by fork or as programs; whichever it is, they are the same ranks."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from launch.compose import compose
from launch.dispatch import dispatch, environment, load_resolved
from launch.job import resolve
from launch.preflight import check_model
from launch.schema import validate
from launch.zygote import Fork, Zygote, end_zygote, zygote_for
from tests.launch import endless, warm
from tests.launch.command import REPOSITORY, TINY, family, rank_process, start, train, wait_for
from tests.launch.endless import assert_all_end, training
from tracking.record import RunRecord

pytestmark = pytest.mark.full
DDP = ["strategy=ddp", *TINY, "run_dir=run"]

# Each case is what a forked process does; the program prints how the agent's side sees it end.
ENDINGS = """
import atexit, json, os, signal, subprocess, sys, threading, time
from launch.fork import Forked

def fail(number, frame):
    raise RuntimeError("the agent's handler, in a rank")

signal.signal(signal.SIGTERM, fail)

def at_exit():
    atexit.register(os.write, 1, b"left in order\\n")
    threading.Thread(target=lambda: (time.sleep(0.3), os.write(1, b"thread done\\n"))).start()

def hook():
    sys.excepthook = lambda kind, error, trace: os._exit(7)
    raise ValueError("for the hook")

def sleep():
    print("ready", flush=True)
    time.sleep(60)

print("said once")
codes = {}
for case in (at_exit, hook, lambda: sys.exit(3), lambda: sys.exit("in words"), lambda: 1 / 0,
             lambda: os.kill(os.getpid(), signal.SIGSEGV)):
    codes[case.__name__ + str(len(codes))] = Forked(case).wait(timeout=30)
sleeper = Forked(sleep)
assert sleeper.poll() is None
assert os.getpgid(sleeper.pid) == sleeper.pid
try:
    sleeper.wait(timeout=1)
except subprocess.TimeoutExpired:
    codes["timeout"] = True
os.killpg(sleeper.pid, signal.SIGTERM)
codes["terminated"] = sleeper.wait(timeout=30)
print(json.dumps(codes))
"""


def caught(process: psutil.Process) -> set[signal.Signals]:
    """The signals for which a process has a handler."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


def test_forked_process_ends_as_a_program_does() -> None:
    program = subprocess.run(
        [sys.executable, "-c", ENDINGS], cwd=REPOSITORY, capture_output=True, text=True, timeout=90
    )
    assert program.returncode == 0, program.stderr
    *lines, last = program.stdout.splitlines()
    codes = json.loads(last)
    assert codes == {
        "at_exit0": 0,
        "hook1": 7,
        "<lambda>2": 3,
        "<lambda>3": 1,
        "<lambda>4": 1,
        "<lambda>5": -signal.SIGSEGV,
        "timeout": True,
        "terminated": -signal.SIGTERM,
    }
    assert lines == ["said once", "thread done", "left in order", "ready"]
    assert "in words" in program.stderr
    assert "ZeroDivisionError" in program.stderr


def test_ranks_are_forks_of_the_agent_and_react_as_programs_of_their_own(tmp_path: Path) -> None:
    """And a killed zygote, whose fork the agent is, takes the run with it."""
    process = start(tmp_path, *endless.ENDLESS)
    wait_for(lambda: training(tmp_path / "run") or process.poll() is not None, "the first steps")
    assert process.poll() is None, (tmp_path / "err").read_text()
    processes = family(process.pid)
    agent = next(p for p in processes if p.name() == "agent")
    zygote = next(p for p in processes if "launch.zygote" in p.cmdline() and p.ppid() == process.pid)
    assert agent.ppid() == zygote.pid
    for rank in (0, 1):
        forked = rank_process(process.pid, rank)
        assert forked.ppid() == agent.pid
        assert forked.cmdline() == agent.cmdline()
        assert os.getpgid(forked.pid) == forked.pid
        assert signal.SIGQUIT in caught(agent)
        assert signal.SIGQUIT not in caught(forked)
    zygote.kill()
    assert process.wait(timeout=30) == 1
    assert_all_end(processes, within_s=5)
    assert "the agent that runs the ranks was killed by SIGKILL" in (tmp_path / "err").read_text()


def test_killed_agent_takes_its_ranks_with_it(tmp_path: Path) -> None:
    process, processes = endless.start_training(tmp_path)
    next(p for p in processes if p.name() == "agent").kill()
    assert process.wait(timeout=30) == 1
    assert_all_end(processes, within_s=5)
    assert "the agent that runs the ranks was killed by SIGKILL" in (tmp_path / "err").read_text()


def test_rank_that_would_not_end_by_itself_is_killed(tmp_path: Path) -> None:
    process, processes = endless.start_training(tmp_path)
    rank_process(process.pid, 1).suspend()  # any signal but SIGKILL has to wait now
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert_all_end(processes, within_s=2)


def test_executed_ranks_train_as_forked_ones(tmp_path: Path) -> None:
    """The way that runs on GPUs go, on the CPU."""
    run = warm.train(tmp_path, *DDP)
    assert (run.returncode, run.stderr) == (0, "")
    executed = tmp_path / "executed"
    (executed / "ranks").mkdir(parents=True)
    resolved = (tmp_path / "run/resolved.yaml").read_text()
    (executed / "resolved.yaml").write_text(resolved.replace(f"{tmp_path}/run", str(executed)))
    variables = environment(load_resolved(executed))
    with closing(Zygote(variables)) as zygote, (tmp_path / "err").open("w") as err:
        agent = zygote.fork("agent", str(executed), "2", "exec", environment=variables, stderr=err)
        assert agent.wait(timeout=120) == 0
    assert (tmp_path / "err").read_text() == ""
    there, here = (RunRecord.read(folder / "record.json").results for folder in (executed, tmp_path / "run"))
    assert (there.train_loss, there.val_loss, there.steps) == (here.train_loss, here.val_loss, here.steps)
    left, left_here = ({path.name for path in (folder / "ranks").iterdir()} for folder in (executed, tmp_path / "run"))
    assert {"0.log", "1.log"} <= left == left_here


def test_forked_ranks_compute_with_several_threads(tmp_path: Path) -> None:
    """They would hang if anything in the agent had used a second thread."""
    run = train(tmp_path, *DDP, "launcher.threads_per_rank=2", "model.net.hidden_size=64", "data.sequence_length=256")
    assert run.returncode == 0, run.stderr


def test_runs_of_one_process_are_forked_from_one_zygote(tmp_path: Path) -> None:
    zygotes = []
    for strategy in ("single", "ddp"):
        words = [*TINY, f"strategy={strategy}", f"run_dir={tmp_path / strategy}"]
        status = dispatch(tmp_path / strategy, strategy, lambda words=words: compose(words))  # type: ignore[misc]
        assert status.state == "completed", status.error
        zygotes.append(zygote_for(environment(load_resolved(tmp_path / strategy))))
    assert zygotes[0] is zygotes[1]
    zygotes[0].close()


def test_zygote_is_kept_for_the_same_environment_and_made_anew_for_another() -> None:
    first = zygote_for({**os.environ, "A": "1"})
    assert zygote_for({**os.environ, "A": "1", "OMP_NUM_THREADS": "7"}) is first
    other = zygote_for({**os.environ, "A": "2"})
    assert other is not first and not first.usable
    other.process.kill()
    other.process.wait()
    third = zygote_for({**os.environ, "A": "2"})
    assert third is not other and third.usable
    third.close()


def test_interrupted_check_of_a_model_ends_with_its_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its exit code would be taken for the next fork's number."""

    def interrupt(fork: Fork, timeout: float | None = None) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fork, "wait", interrupt)
    config = resolve(validate(compose([*TINY, "strategy=pipeline"])))
    variables = environment(config)
    with pytest.raises(KeyboardInterrupt):
        check_model(config, variables)
    assert zygote_for(variables).process.poll() is None  # another one
    end_zygote()
