#!/bin/sh
# A TCPStore client that comes a moment before its server waits for about half a second, not for that moment.
#
# Versions: torch 2.13.0 (CPU), Python 3.11.
# Expected: a client that finds nobody listening tries again soon; with the server there 20 ms later, it is connected some
#   20 to 50 ms after it began.
# Seen: the first retry comes only after about half a second. Ranks of a job without torchrun's store (started by hand, by
#   a test, by a batch system) all pay it whenever rank 0 has a little more to do first. A socket that listens from the
#   start, handed to the server as master_listen_fd, has early clients wait in its queue: then it is that moment.
# Fails (exit 1) once an early client is connected within 0.2 s.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/store.py" <<'PY'
import multiprocessing
import socket
import statistics
import sys
import time

import torch
from torch.distributed import TCPStore

LATE_S = 0.02


def client(port, queue):
    began = time.perf_counter()
    TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    queue.put(time.perf_counter() - began)


def measure(listens):
    """How long a client takes whose server is there LATE_S after it began."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if not listens:
        listener.close()
    queue = multiprocessing.Queue()
    process = multiprocessing.get_context("fork").Process(target=client, args=(port, queue))
    process.start()
    time.sleep(LATE_S)
    words = {"master_listen_fd": listener.detach()} if listens else {}
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, **words)
    seconds = queue.get(timeout=60)
    process.join()
    del server
    return seconds


early = statistics.median(measure(listens=False) for _ in range(5))
waits = statistics.median(measure(listens=True) for _ in range(5))
print(f"torch {torch.__version__}; the server is there {LATE_S} s after the client began; medians of 5")
print(f"  nobody listens before: connected after {early:.3f} s")
print(f"  a socket listens from the start: connected after {waits:.3f} s")
sys.exit(early < 0.2)
PY
"$folder/venv/bin/python" "$folder/store.py"
