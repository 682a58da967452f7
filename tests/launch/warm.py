"""`python train.py` without the seconds of its imports: a process that has made them once forks each command.

Of a command's two programs, the dispatcher and its zygote, each is a fork of that process, with the environment,
folder, session and streams that it would have. What only a new interpreter shows is tested by tests.launch.command.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launch import fork, zygote
from tests.launch.command import REPOSITORY, train_command, user_environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.launch.preloaded"])


class Command:
    """A command that runs; known by what tests use of subprocess.Popen."""

    def __init__(self, words: list[str], cwd: Path, environment: Mapping[str, str], out: Path, err: Path) -> None:
        self.words = words
        self.process = CONTEXT.Process(target=become, args=(words, str(cwd), dict(environment), str(out), str(err)))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        atexit.register(self.process.kill)  # before multiprocessing would wait for what a failed test has left

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(cwd: Path, *overrides: str) -> Command:
    """`python train.py <overrides>`, left running, its output in files of `cwd`."""
    return Command(train_command(*overrides)[1:], cwd, user_environment(), cwd / "out", cwd / "err")


def train(cwd: Path, *overrides: str, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train.py <overrides>` to its end."""
    words = train_command(*overrides)[1:]
    with TemporaryDirectory() as streams:
        out, err = Path(streams) / "out", Path(streams) / "err"
        command = Command(words, cwd, user_environment() | environment, out, err)
        try:
            code = command.wait(timeout_s)
        finally:
            command.kill()
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def become(words: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    """Be in this forked process the program of a command; does not return."""
    os.setsid()
    for number, path in enumerate((out, err), 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    zygote.start_process = ForkedAhead()
    be_program(lambda: runpy.run_path(words[0], run_name="__main__"), words, environment, [str(REPOSITORY)])


def be_program(function: Callable[[], Any], words: list[str], environment: Mapping[str, str], path: list[str]) -> None:
    """Call `function` as an interpreter would that has just been started; does not return."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path = [*path, *(place for place in sys.path if place not in ("", *path))]
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fork.run_to_end(function, set())


class ForkedAhead:
    """Gives a dispatcher a zygote that was forked before it began, so that nothing of it is in there."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                self.channel.close()
                self.await_call(theirs)
        self.returncode: int | None = None

    def await_call(self, channel: socket.socket) -> None:
        call, descriptors, _, _ = socket.recv_fds(channel, 2**20, 1)
        if not call:  # the dispatcher has ended without one
            os._exit(0)
        channel.close()
        os.setsid()
        environment = json.loads(call)
        be_program(
            zygote.main, ["zygote", str(descriptors[0])], environment, environment["PYTHONPATH"].split(os.pathsep)
        )

    def __call__(self, descriptor: int, environment: Mapping[str, str]) -> Any:
        if self.channel.fileno() == -1:  # a dispatcher may need a second one
            return START_PROCESS(descriptor, environment)
        with self.channel:
            socket.send_fds(self.channel, [json.dumps(dict(environment)).encode()], [descriptor])
        return self

    def poll(self) -> int | None:
        return self.ended(os.WNOHANG)

    def wait(self) -> int:
        code = self.ended(0)
        assert code is not None
        return code

    def ended(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


START_PROCESS = zygote.start_process
