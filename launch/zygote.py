"""A process that has imported, once, what every run needs, and forks from itself what a dispatcher asks for.

`zygote_for` is the dispatcher's side, which imports no torch; `python -m launch.zygote <descriptor>` is the process.
It computes nothing: a process that has started OpenMP threads cannot fork one that computes, nor one that has touched
CUDA one that uses it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch import alive
from launch.lifeline import die_with_parent, parented
from launch.signals import leave_to_dispatcher

if TYPE_CHECKING:
    from typing import IO

Program = Literal["agent", "preflight"]

MOST_KEPT = 8  # open files that a program may be given besides its output
NUMBER = struct.Struct("!q")  # how pids, exit codes and lengths travel


def start_process(descriptor: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a zygote that serves the socket `descriptor`."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.zygote", str(descriptor)],
        env=environment,
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches the dispatcher alone, which ends the ranks in order
    )


class Zygote:
    """The dispatcher's end of a zygote; `environment` is that of all it forks but for the number of threads."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = shared(environment)
        self.owner = os.getpid()
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = start_process(theirs.fileno(), parented(self.environment))

    def fork(
        self,
        program: Program,
        *arguments: str,
        environment: Mapping[str, str],
        stderr: IO[str] | None = None,
        kept: Sequence[int] = (),
    ) -> Fork:
        """Start a program in a session of its own, where this process is and with its output.

        kept: open files that it, and what it forks, is to have as long as it lives.
        """
        request = json.dumps([program, arguments, dict(environment), str(Path.cwd())]).encode()
        sys.stdout.flush()
        sys.stderr.flush()
        descriptors = [1, 2 if stderr is None else stderr.fileno(), *kept]
        try:
            with suppress(BlockingIOError):  # of an earlier fork, whose end an interrupt kept from being noticed
                self.channel.recv(2**10, socket.MSG_DONTWAIT)
            socket.send_fds(self.channel, [NUMBER.pack(len(request))], descriptors)
            self.channel.sendall(request)
            pid = self.number()
        except BaseException:  # an interrupt, too: what may just have been forked dies with its zygote
            self.close()
            raise
        if pid is None:
            raise ChildProcessError(f"the process that starts ranks ended with exit code {self.process.wait()}")
        return Fork(self, pid)

    def number(self, *, keep: bool = False) -> int | None:
        """The next number from the zygote, None once it has ended; with `keep`, it stays to be read again."""
        flags = socket.MSG_WAITALL | (socket.MSG_PEEK if keep else 0)
        try:
            word = self.channel.recv(NUMBER.size, flags)
        except ConnectionResetError:
            return None
        return NUMBER.unpack(word)[0] if len(word) == NUMBER.size else None

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def close(self) -> None:
        """End the zygote, which has nothing to lose; what it has forked and still runs ends with it."""
        self.channel.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


class Fork:
    """A process that a zygote has forked, known by what a dispatcher uses of subprocess.Popen."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.zygote, self.pid = zygote, pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the negated signal that it died of: SIGKILL where the zygote died, and it by that."""
        if self.returncode is None:
            if not select.select([self.zygote.channel], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            code = self.zygote.number(keep=True)
            self.returncode = -signal.SIGKILL if code is None else code
            self.zygote.number()
        return self.returncode

    def interrupt(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGINT)


_zygotes: list[Zygote] = []  # of this process: none or one


def zygote_for(environment: Mapping[str, str]) -> Zygote:
    """This process's zygote; started, or anew if it ended or `environment` is another. Does not wait for it."""
    if not (_zygotes and _zygotes[0].usable and _zygotes[0].environment == shared(environment)):
        end_zygote()
        _zygotes.append(Zygote(environment))
    return _zygotes[0]


@atexit.register
def end_zygote() -> None:
    """End this process's zygote, if it has one."""
    while _zygotes:
        _zygotes.pop().close()


def shared(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the number of threads that a process has which computes nothing; ranks set their own."""
    return {**environment, "OMP_NUM_THREADS": "1"}


def serve(channel: socket.socket, programs: Mapping[str, Callable[..., int]]) -> None:
    """Fork what is asked for, one after the other, until the dispatcher hangs up."""
    while True:
        head, descriptors, _, _ = socket.recv_fds(channel, NUMBER.size, 2 + MOST_KEPT)
        if len(head) < NUMBER.size:
            return
        request = channel.recv(NUMBER.unpack(head)[0], socket.MSG_WAITALL)
        program, arguments, environment, folder = json.loads(request)
        environment = parented(environment)
        pid = os.fork()
        if pid == 0:
            channel.close()
            become(descriptors, environment, folder, partial(programs[program], *arguments))
        for descriptor in descriptors:
            os.close(descriptor)
        channel.sendall(NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        channel.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))


def become(descriptors: list[int], environment: dict[str, str], folder: str, program: Callable[[], int]) -> None:
    """Be in this forked process a program of its own, which gives its exit code; does not return."""
    from launch.fork import run_to_end

    os.setsid()
    output, kept = descriptors[:2], descriptors[2:]
    for number, descriptor in enumerate(output, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    alive.inherit(kept)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    die_with_parent()
    run_to_end(lambda: sys.exit(program()), set())


def main() -> None:
    die_with_parent()  # before the seconds that importing torch takes
    leave_to_dispatcher()
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    from launch import agent, preflight

    gc.freeze()  # forks share these objects' pages until one writes to them: collections are to leave them alone
    serve(channel, {"agent": agent.main, "preflight": preflight.main})


if __name__ == "__main__":
    from launch import zygote  # Python warns of forks beside the lifeline's thread, in __main__ alone visibly

    zygote.main()
