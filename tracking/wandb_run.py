"""A W&B run: online where it can be, offline where not, and never a reason for a run to fail or to wait.

Imports no Lightning, so that a dispatcher can log what belongs to a whole sweep.
"""

import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import wandb
from wandb.errors import AuthenticationError
from wandb.sdk.lib import wbauth
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from tracking.redact import redact
from tracking.wandb_config import ENVIRONMENT_MODES, Mode, WandbConfig

# The server must have answered after so long, else the run goes on offline. Measured with wandb 0.31: a host that
# accepts and never answers takes 11 s in all, one that refuses 9 s; 30 s is what a user is promised.
INIT_TIMEOUT_S = 8
FINISH_TIMEOUT_S = 30
GRACE_S = 5  # for W&B's service to notice its own timeout, before it is killed

# What W&B raises when it cannot reach its server, or its own service is gone.
TROUBLE = (wandb.Error, TimeoutError, ConnectionError, HandleAbandonedError, MailboxClosedError)


def start_run(
    config: WandbConfig,
    *,
    run_dir: Path,
    job_type: str,
    name: str,
    run_config: Mapping[str, Any],
    run_id: str | None = None,
    group: str | None = None,
    tags: Iterable[str] = (),
    finish_timeout_s: float = FINISH_TIMEOUT_S,
) -> wandb.Run | None:
    """Start a W&B run, None when W&B is disabled.

    A server that does not answer, or does not take the key, costs one line on stderr and at most 30 s: the run is then
    an offline one, to be synced later. `run_config` is logged whole, secrets masked. `finish_timeout_s` bounds
    `finish_run`; W&B wants to know it from the start.

    Raises ValueError for a WANDB_MODE that does not exist.
    """
    mode = choose_mode(config)
    if mode == "disabled":  # asked before W&B's service is started, which takes a third of a second
        return None
    be_quiet()
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
    if "WANDB_SWEEP_ID" in os.environ:  # whose parameters stand in the place of the sections that they are named like
        keys["config"] = {**keys["config"], "resolved": keys["config"]}
    return _online(keys) if mode == "online" else wandb.init(mode="offline", **keys)


def be_quiet() -> None:
    """Before anything else of W&B's: what there is to say, we say in one line."""
    # W&B's own crash reports hold its service (and so our exit) for 10 s when the server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb.setup(wandb.Settings(silent=True))


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
    be_quiet()
    host = wandb.setup().settings.base_url
    try:
        return wbauth.authenticate_session(host=host, source="concord", prompt=False, update_session=False) is not None
    except AuthenticationError:
        return True  # there is one, if a wrong one: wandb.init will say what is wrong with it


def save_file(run: wandb.Run, path: Path) -> None:
    """Keep a copy of the file with the run, to be uploaded now, or by `wandb sync`.

    A copy, because W&B would keep a link, and of a run that is moved elsewhere to be synced nothing but the link.
    """
    kept = shutil.copy2(path, Path(run.dir))
    run.save(kept, base_path=run.dir, policy="now")


def finish_run(run: wandb.Run, *, ok: bool) -> None:
    """End the W&B run, and W&B's service process, within the finish timeout and a short grace.

    What could not be uploaded stays on disk, and one line on stderr says where, and how to sync it.
    """
    try:
        _within(run.settings.finish_timeout + GRACE_S, partial(run.finish, exit_code=0 if ok else 1))
    except TROUBLE as error:
        say(f"the run is not all uploaded ({first_line(error)}); the data are on disk, do later: {sync_command(run)}")
    close_service()


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
        reason = first_line(error)
    else:
        say(f"{run.url}")
        return run
    # The service still holds the run's id; and what the attempt left would be synced as a second, empty run.
    close_service()
    for folder in set(Path(keys["dir"]).glob("wandb/run-*")) - before:
        shutil.rmtree(folder)
    run = wandb.init(mode="offline", **keys)
    say(f"{host} cannot be used ({reason}); the run goes on offline, do later: {sync_command(run)}")
    return run


def close_service() -> None:
    """End W&B's service process, by force if it does not end by itself: at exit, W&B would wait for it forever."""
    service = _service()
    try:
        _within(GRACE_S, wandb.teardown)
    except TROUBLE:
        for process in service:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _service() -> list[psutil.Process]:
    """wandb-core, and below it its monitor of the GPU: both are listed now, when the one still leads to the other."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may be ending by itself
            if child.name().startswith("wandb-"):
                found.append(child)
    return found


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


def first_line(error: BaseException) -> str:
    """The first line of W&B's message (those after it advise on W&B's settings), or the error's kind."""
    lines = str(error).splitlines()
    return redact(lines[0]) if lines and lines[0] != "<no message>" else type(error).__name__


def say(text: str) -> None:
    sys.stderr.write(f"W&B: {text}\n")
    sys.stderr.flush()
