"""Turns one validated config into processes, waits for them, and says what became of them. Imports no torch."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from datamodules.order import evaluation_batches
from datamodules.spec import SampledData
from launch import alive, preflight
from launch.attempts import earlier_status, earlier_tree, give_attempt_back, number_attempt, pending
from launch.check import checked
from launch.claim import claim_folder, recover_folder
from launch.compose import REPOSITORY
from launch.failure import described, first_failure, is_worded, oom_kills
from launch.job import Job
from launch.lease import BEAT_S, beating
from launch.lifeline import parented
from launch.resume import check_resumed_data, resolve_resume
from launch.schema import ConfigError, RunConfig, validate
from launch.signals import TerminatedError, ask_to_end, asked_by, ended_path, last_word, way_on
from launch.start import resolve_weights
from launch.traces import in_sweep, leave_nothing, missing, remove_empty
from launch.zygote import Fork, zygote_for
from strategies.durable import write_whole
from tracking.status import RunStatus, ended, running

# What a launcher leaves in the environment of its processes; a run of ours inherits none of it.
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS",
)  # fmt: skip

# An agent that is interrupted gets this long, in which it kills its ranks: Ctrl-C is to be answered within 3 s.
SHUTDOWN_S = 2

FULL_BYTES = 2**20  # less than this left is a full disk: logs and records no longer fit

STARTED = "CONCORD_STARTED"  # variable of the ranks: when their run began, in seconds since the epoch

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


def dispatch(run_dir: Path, name: str, make_tree: Callable[[], dict[str, Any]], *, again: bool = False) -> RunStatus:
    """Run the config that `make_tree` composes to its end: check, write resolved.yaml, start the ranks, wait.

    With `again`, the run may go on in a folder that an earlier attempt has left.

    Never raises for a mistake of the user's or a failure of the run: both are in the returned status, and but for
    a folder that belongs to another run, in the run folder's status.json. Lets KeyboardInterrupt through.
    """
    status, made = running(name, name, beat_s=BEAT_S), missing(run_dir)
    try:
        if again and (done := complete(run_dir, make_tree)):
            return done
        checked({**make_tree(), "run_dir": str(run_dir)})
    except ConfigError as error:
        return refuse_unclaimed(run_dir, status, error)
    try:
        claim_folder(run_dir, status, again=again)
    except ConfigError as error:
        return ended(status, "refused", error=str(error), exit_code=EXIT_REFUSED)
    try:
        with beating(run_dir, status):
            final = run_claimed(run_dir, status, make_tree)
    finally:
        alive.give_up(run_dir)
    if final.state == "refused":
        remove_empty(made)
    return final


def run_claimed(run_dir: Path, status: RunStatus, make_tree: Callable[[], dict[str, Any]]) -> RunStatus:
    """Run a config in a folder that is this run's."""
    try:
        tree = make_tree()
        job = prepare({**tree, "run_dir": str(run_dir)})
        final = run_agent(job, status, remarks(job, tree))
    except ConfigError as error:
        return refuse(run_dir, status, error)
    except KeyboardInterrupt as error:
        code = error.exit_code if isinstance(error, TerminatedError) else EXIT_INTERRUPTED
        word = str(error) or f"interrupted by Ctrl-C{way_on(run_dir)}"
        end_unbegun(run_dir, ended(status, "interrupted", error=word, exit_code=code))
        if isinstance(error, TerminatedError):
            raise
        raise KeyboardInterrupt(word) from None
    with suppress(OSError):  # on a full disk the line on the terminal and the exit code must do
        final.write(run_dir)
    return final


def complete(run_dir: Path, make_tree: Callable[[], dict[str, Any]]) -> RunStatus | None:
    """The status of a run that has already taken all the steps it is asked for; None where there is more to do."""
    recover_folder(run_dir)
    status, tree = earlier_status(run_dir), earlier_tree(run_dir)
    if status is None or status.state != "completed" or tree is None:
        return None
    asked, done = validate({**make_tree(), "run_dir": str(run_dir)}), validate(tree)
    same = all(getattr(asked, key) == getattr(done, key) for key in ("model", "data", "trainer", "callbacks"))
    return status if same else None  # else there is more to do, or something to be refused


def refuse_unclaimed(run_dir: Path, status: RunStatus, error: ConfigError) -> RunStatus:
    """The status of a run that nothing was made for; of a sweep's job it is written down, for the table."""
    final = ended(status, "refused", error=str(error), exit_code=EXIT_REFUSED)
    if in_sweep(run_dir) and not (run_dir / "status.json").exists():
        with suppress(OSError):
            run_dir.mkdir(exist_ok=True)
            final.write(run_dir)
    return final


def refuse(run_dir: Path, status: RunStatus, error: ConfigError) -> RunStatus:
    """Leave nothing in the folder of a run that did not start, which this process has claimed.

    If an earlier attempt has left something there, all of that is as it was, its status too. A sweep's table says of
    each job what became of it: there, why it did not start is written down.
    """
    final = ended(status, "refused", error=str(error), exit_code=EXIT_REFUSED)
    ranks = run_dir / "ranks"
    with suppress(OSError):  # not there yet; or ranks of another launcher have begun to write there
        ranks.rmdir()
    if pending(run_dir).exists() or in_sweep(run_dir):
        end_unbegun(run_dir, final)
    else:
        leave_nothing(run_dir)
    return final


def end_unbegun(run_dir: Path, final: RunStatus) -> None:
    """Leave the folder of an attempt that has not begun as it was before, or else with its last status."""
    if pending(run_dir).exists():
        give_attempt_back(run_dir)
        earlier = earlier_status(run_dir)
        if earlier is not None and earlier.state != "refused":
            return
    final.write(run_dir)


def prepare(
    tree: dict[str, Any], world_size: int | None = None, local_world_size: int | None = None, *, write: bool = True
) -> Job:
    """Everything that can be known or made before training starts; ConfigError if it shows that the run cannot go.

    World sizes are given by a rank of another launcher; of those, only the first is to `write` resolved.yaml.
    """
    config = resolve_resume(checked(tree, world_size, local_world_size))
    if config.resume is None:
        config = resolve_weights(config)
    job = Job.of(config)
    if write and world_size is None:
        zygote_for(environment(config))  # it imports while the data is prepared
    try:
        job.data.prepare()
        check_validation(job)
        digest = job.data.digest() if isinstance(job.data, SampledData) else None
    except ValueError as error:  # data may be the user's own, too
        raise ConfigError(str(error) if is_worded(error) else f"data: its code raised {described(error)}") from None
    except IndexError:  # what pathlib makes of a pattern such as /
        files = config.data.get("files")
        raise ConfigError(f"data.files={files} is no pattern of files; give one such as 'books/*.txt'.") from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; free some space, or correct the path.") from None
    config = config.model_copy(update={"data_digest": digest})
    check_resumed_data(config)
    job = Job.of(config)
    preflight.check_model(config, environment(config))
    if job.extensions:
        preflight.build_extensions(job.extensions, config.launcher.accelerator, environment(config))
    if write:
        if pending(job.run_dir).exists():
            number_attempt(job.run_dir)  # before there is a resolved.yaml of this one: until then it can be given back
        # Ranks of another launcher wait for it.
        write_whole(job.run_dir / "resolved.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    return job


def check_validation(job: Job) -> None:
    """Every data rank needs a sample to validate on: sharded strategies would wait for the one that has none."""
    if isinstance(job.data, SampledData):
        num_samples = min(len(job.data.val_samples()), job.data.max_val_samples or sys.maxsize)
        evaluation_batches(num_samples, job.data.micro_batch_size, 0, job.mesh.data_ranks)


def load_resolved(run_dir: Path) -> RunConfig:
    """The config that the dispatcher wrote for the ranks."""
    return validate(yaml.safe_load((run_dir / "resolved.yaml").read_text()))


def run_agent(job: Job, status: RunStatus, remarks: str = "") -> RunStatus:
    """Start torchrun's agent for the job, wait for it, and name the cause if it failed."""
    print(headline(job) + remarks, flush=True)
    oom_kills_before = oom_kills()
    variables = environment(job.config)
    start = "fork" if job.config.launcher.accelerator == "cpu" else "exec"  # CUDA does not survive a fork
    process = zygote_for(variables).fork(
        "agent",
        str(job.run_dir),
        str(job.world_size),
        start,
        environment={**variables, STARTED: str(time.time())},
        kept=alive.files(),
    )
    with ending(process):
        code = wait(process, job)
    if code == 0 and ended_path(job.run_dir).exists():
        number = asked_by(job.run_dir, is_first=True)
        raise TerminatedError(number, last_word(job.run_dir, number))
    if code == 0:
        return ended(status, "completed")
    failure = first_failure(job.run_dir, job.world_size, oom_kills_before)
    if failure is None:
        word = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        error = f"the agent that runs the ranks {word}; see {job.run_dir / 'ranks'}"
    else:
        error = failure.line(job.run_dir, job.world_size)
    if shutil.disk_usage(job.run_dir).free < FULL_BYTES:
        error = f"run_dir={job.run_dir}: its disk is full; free some space or choose another. Then: {error}"
    return ended(status, "failed", error=error, exit_code=EXIT_FAILED)


def wait(process: Fork, job: Job) -> int:
    """The agent's exit code; on a signal, once its ranks have ended the run at the end of a step."""
    try:
        return process.wait()
    except TerminatedError as error:
        if job.unsaved is not None:
            raise
        ask_to_end(job.run_dir, error.number)
        name = signal.Signals(error.number).name
        with suppress(OSError):  # the terminal may be what has ended
            print(f"{name}: ending after the next step; a second signal ends the run at once.", file=sys.stderr)
    while True:
        try:
            return process.wait()
        except TerminatedError as error:
            if error.number != signal.SIGHUP:  # of which a closing terminal's shell and system send one each
                raise


def headline(job: Job) -> str:
    """One line that says what is about to run, and where."""
    config = job.config
    one, many = ("GPU", "GPUs") if config.launcher.accelerator == "gpu" else ("CPU process", "CPU processes")
    devices = one if job.world_size == 1 else many
    untested = "; this recipe is untested" if config.status == "untested" else ""
    return (
        f"{config.name}: {config.choices.get('model')} on {job.world_size} {devices} "
        f"({job.mesh.text}), {config.precision.name}, accumulation {job.accumulation}, in {job.run_dir}{untested}"
    )


def remarks(job: Job, tree: Mapping[str, Any]) -> str:
    """What of the config has no effect, or less than may be thought; for the end of the headline."""
    told, asked = "", tree["launcher"]["devices"]
    if isinstance(asked, int) and asked > job.world_size:
        told += f"; of launcher.devices={asked}, strategy={job.strategy.name} uses {job.world_size}"
    warmup, steps = job.config.scheduler.get("warmup_steps"), job.config.trainer.max_steps
    if isinstance(warmup, int) and warmup >= steps:
        told += f"; scheduler.warmup_steps={warmup} do not end before trainer.max_steps={steps}"
    return told


def environment(config: RunConfig) -> dict[str, str]:
    """The dispatcher's environment without what an outer launcher or an earlier run left in it."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(("TORCHELASTIC_", "SLURM_"))
    }
    # A module of the user's that lies in the working directory can be named in a _target_, but hides none of ours.
    path = [str(REPOSITORY), str(Path.cwd()), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **parented(kept),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(config.launcher.threads_per_rank),
    }


@contextmanager
def ending(process: Fork) -> Iterator[None]:
    """However the block is left, no process of the run is left with it."""
    try:
        yield
    except BaseException:
        tree = descendants(process)
        process.interrupt()
        psutil.wait_procs(tree, timeout=SHUTDOWN_S)
        for survivor in tree:
            if survivor.is_running():
                survivor.kill()
        process.wait()
        raise


def descendants(process: Fork) -> list[psutil.Process]:
    try:
        agent = psutil.Process(process.pid)
        return [agent, *agent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
