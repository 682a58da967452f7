"""Ranks by fork: the processes of a test, each with a rank of one gloo world, without torchrun's seconds."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 180  # compiling a block on two ranks takes 75 s where two busy cores are all there is


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def become_rank(rank: int, world_size: int, port: int, log: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
    )
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


def run_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> None:
    """Call `function(*args)` on `world_size` forked ranks and wait; AssertionError with the logs if one fails.

    Ranks talk to the test through files in `folder`.
    """
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    port = free_port()
    ranks = [
        context.Process(target=become_rank, args=(rank, world_size, port, logs[rank], function, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 5)  # the others fail too, or wait for ever
        ranks[0].join(0.02)
        time.sleep(0.01)
    for process in ranks:
        process.kill()
        process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    report = "\n".join(f"--- rank {rank}\n{logs[rank].read_text()[-3000:]}" for rank in failed)
    assert not failed, f"ranks {failed} of {world_size} failed\n{report}"
