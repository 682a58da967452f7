"""Ranks by fork: the processes of a test, each with a rank of one gloo world, without torchrun's seconds."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

TIMEOUT_S = 180  # compiling a block on two ranks takes 75 s where two busy cores are all there is


def become_rank(
    rank: int, world_size: int, listener: socket.socket, log: Path, function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(listener.getsockname()[1]),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RUN_ID="tests",
    )
    listener.close()
    # What the parent has left is not for this rank to collect. To look through it, in pages that are copied for that,
    # takes a second in each of the two collections that DeepSpeed asks for when it starts; and among it may be threads
    # to be ended, which this process has not.
    gc.freeze()
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest's own streams write to its captures
    code = 1
    try:
        function(*args)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # pytest's own exit handlers belong to the parent


class Ranks:
    """Forked processes of one gloo world that call a function, each with its output in a log.

    Their store is served from here, as torchrun's agent does it: a rank that comes before another that serves would try
    again only half a second later. They are forked before that takes a thread; till then they wait at the socket.
    """

    def __init__(self, logs: Sequence[Path], function: Callable[..., Any], args: tuple) -> None:
        context = multiprocessing.get_context("fork")
        self.logs = logs
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.processes = [
                context.Process(target=become_rank, args=(rank, len(logs), listener, log, function, args))
                for rank, log in enumerate(logs)
            ]
            for process in self.processes:
                process.start()
            host, port = listener.getsockname()
            self.server: TCPStore | None = TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )

    @property
    def failed(self) -> list[int]:
        """Those that have ended, but not with 0."""
        return [rank for rank, process in enumerate(self.processes) if process.exitcode]

    @property
    def are_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> None:
        """Until all have ended, or some have failed and the others had time to say why, too; the rest is killed."""
        deadline = time.monotonic() + seconds
        while self.are_running and time.monotonic() < deadline:
            if self.failed:
                deadline = min(deadline, time.monotonic() + 5)  # the others fail too, or wait for ever
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.is_alive()], timeout=0.1)
        self.kill()
        self.server = None

    def kill(self, ranks: Iterable[int] | None = None) -> None:
        """Kill some ranks, or all, and wait for their end."""
        chosen = [self.processes[rank] for rank in (range(len(self.processes)) if ranks is None else ranks)]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()


def run_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> None:
    """Call `function(*args)` on `world_size` forked ranks and wait; AssertionError with the logs if one fails.

    Ranks talk to the test through files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks([folder / f"rank{rank}.log" for rank in range(world_size)], function, args)
    ranks.wait(TIMEOUT_S)
    report = "\n".join(f"--- rank {rank}\n{ranks.logs[rank].read_text()[-3000:]}" for rank in ranks.failed)
    assert not ranks.failed, f"ranks {ranks.failed} of {world_size} failed\n{report}"
