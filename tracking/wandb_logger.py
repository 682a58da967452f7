"""W&B for a run: online where it can be, offline where not, and never a reason for a run to fail or to wait."""

import os
import secrets
import shutil
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import psutil
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import AuthenticationError
from wandb.sdk.lib import wbauth
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from tracking.record import RunRecord
from tracking.redact import redact
from tracking.wandb_config import WandbConfig

# The server must have answered after so long, else the run goes on offline. Measured with wandb 0.31: a host that
# accepts and never answers takes 11 s in all, one that refuses 9 s; 30 s is what a user is promised.
INIT_TIMEOUT_S = 8
FINISH_TIMEOUT_S = 30
GRACE_S = 5  # for W&B's service to notice its own timeout, before it is killed

# What W&B raises when it cannot reach its server, or its own service is gone.
TROUBLE = (wandb.Error, TimeoutError, ConnectionError, HandleAbandonedError, MailboxClosedError)

Mode = Literal["online", "offline", "disabled"]
ENVIRONMENT_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


@final
class RunLogger(WandbLogger):
    """Lightning's logger with Concord's two axes in every row: `step` (optimizer steps) and `tokens` (seen so far)."""

    def __init__(self, run: wandb.Run, *, save_dir: Path, tokens_per_step: int | None) -> None:
        super().__init__(experiment=run, save_dir=save_dir, project=run.project, id=run.id, log_model=False)
        self._tokens_per_step = tokens_per_step
        self._lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {key: value for key, value in metrics.items() if key != "epoch"}  # a run is one epoch long
        if step is not None:
            row["step"] = step
            if self._tokens_per_step is not None:
                row["tokens"] = step * self._tokens_per_step
        self._send(partial(self.experiment.log, row))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Whatever a model saves as its hyperparameters, without the secrets in it."""
        safe = redact(vars(params) if isinstance(params, Namespace) else params)
        self._send(partial(super().log_hyperparams, safe))

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._send(partial(self.experiment.summary.update, values))

    def _send(self, work: Callable[[], None]) -> None:
        """Hand something to W&B's service process; when that is gone, training goes on without it."""
        if self._lost:
            return
        try:
            work()
        except TROUBLE as error:
            self._lost = True
            _say(f"its own process is gone ({_reason(error)}); from here on, metrics.csv alone has the metrics.")


def start_wandb(
    config: WandbConfig,
    *,
    run_dir: Path,
    job_type: str,
    name: str,
    run_config: Mapping[str, Any],
    run_id: str | None = None,
    group: str | None = None,
    tags: Iterable[str] = (),
    tokens_per_step: int | None = None,
    finish_timeout_s: float = FINISH_TIMEOUT_S,
) -> RunLogger | None:
    """Start the W&B run of rank 0 and give its logger, None when W&B is disabled.

    A server that does not answer, or does not take the key, costs one line on stderr and at most 30 s: the run is then
    an offline one, to be synced later. `run_config` is logged whole, secrets masked. `finish_timeout_s` bounds
    `finish_wandb`; W&B wants to know it from the start.

    Raises ValueError for a WANDB_MODE that does not exist.
    """
    # W&B's own crash reports hold its service (and so our exit) for 10 s when the server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb.setup(wandb.Settings(silent=True))  # what there is to say, we say in one line
    mode = choose_mode(config)
    if mode == "disabled":
        return None
    keys: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "group": group or config.group,
        "job_type": job_type,
        "name": name,
        "tags": [*config.tags, *tags],
        "id": run_id or secrets.token_hex(4),
        "dir": run_dir,
        "config": redact(run_config),
        "settings": _settings(finish_timeout_s),
    }
    run = _online(keys) if mode == "online" else wandb.init(mode="offline", **keys)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    run.define_metric("val/loss", step_metric="step", summary="min")
    return RunLogger(run, save_dir=run_dir, tokens_per_step=tokens_per_step)


def choose_mode(config: WandbConfig) -> Mode:
    """`config.mode`, with `auto` settled: WANDB_MODE where it is set, else online where there is an API key."""
    if config.mode != "auto":
        return config.mode
    wanted = os.environ.get("WANDB_MODE")
    if not wanted:
        return "online" if has_api_key() else "offline"
    if wanted not in ENVIRONMENT_MODES:
        choices = ", ".join(ENVIRONMENT_MODES)
        raise ValueError(f"WANDB_MODE={wanted} is no mode of W&B; set it to one of {choices}, or unset it.")
    return ENVIRONMENT_MODES[wanted]


def has_api_key() -> bool:
    """Whether W&B finds a key for its configured server: in the environment, in netrc or in its settings."""
    host = wandb.setup().settings.base_url
    try:
        return wbauth.authenticate_session(host=host, source="concord", prompt=False, update_session=False) is not None
    except AuthenticationError:
        return True  # there is one, if a wrong one: wandb.init will say what is wrong with it


def log_record(loggers: Iterable[Logger], record: RunRecord) -> None:
    """Write the record's results in the W&B summary, as `record/<field>`: they are equal to record.json's."""
    results = record.results.model_dump(mode="json")
    for logger in _of_wandb(loggers):
        logger.log_summary({f"record/{key}": value for key, value in results.items()})


def finish_wandb(loggers: Iterable[Logger], *, ok: bool) -> None:
    """End the W&B runs among `loggers`, and W&B's service process, within the finish timeout and a short grace.

    What could not be uploaded stays on disk, and one line on stderr says where, and how to sync it.
    """
    for logger in _of_wandb(loggers):
        run = logger.experiment
        try:
            _within(run.settings.finish_timeout + GRACE_S, partial(run.finish, exit_code=0 if ok else 1))
        except TROUBLE as error:
            _say(f"the run is not all uploaded ({_reason(error)}); the data are on disk, do later: {sync_command(run)}")
        _close_service()


def sync_command(run: wandb.Run) -> str:
    """The command that uploads what the run left on disk."""
    online = "" if run.settings.mode == "offline" else "--include-online "
    return f"wandb sync {online}{Path(run.settings.sync_dir)}"


def _settings(finish_timeout_s: float) -> wandb.Settings:
    return wandb.Settings(
        silent=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=finish_timeout_s,
        finish_timeout_raises=True,
        console="off",  # ranks/0.log has it, and there a secret in a user's print stays on the machine
        # These would send the command line, the git remote with the credentials in its URL, and the source.
        x_disable_meta=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
    )


def _online(keys: dict[str, Any]) -> wandb.Run:
    """An online run, or an offline one and a warning."""
    host = redact(wandb.setup().settings.base_url)
    before = set(Path(keys["dir"]).glob("wandb/run-*"))
    try:
        if not has_api_key():  # wandb.init would ask for it, and wait
            raise wandb.Error("no API key; `wandb login` stores one")
        run = wandb.init(mode="online", **keys)
    except TROUBLE as error:
        reason = _reason(error)
    else:
        _say(f"{run.url}")
        return run
    # The service still holds the run's id; and what the attempt left would be synced as a second, empty run.
    _close_service()
    for folder in set(Path(keys["dir"]).glob("wandb/run-*")) - before:
        shutil.rmtree(folder)
    run = wandb.init(mode="offline", **keys)
    _say(f"{host} cannot be used ({reason}); the run goes on offline, do later: {sync_command(run)}")
    return run


def _close_service() -> None:
    """End W&B's service process, by force if it does not end by itself: at exit, W&B would wait for it forever."""
    # wandb-core, and below it its monitor of the GPU: both are listed now, when the one still leads to the other.
    service = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("wandb-")]
    try:
        _within(GRACE_S, wandb.teardown)
    except TROUBLE:
        for process in filter(psutil.Process.is_running, service):
            process.kill()


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do `work` in a thread of its own; TimeoutError when it takes longer, and the thread is left to itself."""
    outcome: Future[None] = Future()

    def do() -> None:
        try:
            work()
        except TROUBLE as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=do, daemon=True).start()
    outcome.result(seconds)


def _of_wandb(loggers: Iterable[Logger]) -> list[RunLogger]:
    return [logger for logger in loggers if isinstance(logger, RunLogger)]


def _reason(error: BaseException) -> str:
    """The first line of W&B's message (those after it advise on W&B's settings), or the error's kind."""
    lines = str(error).splitlines()
    return redact(lines[0]) if lines and lines[0] != "<no message>" else type(error).__name__


def _say(text: str) -> None:
    sys.stderr.write(f"W&B: {text}\n")
    sys.stderr.flush()
