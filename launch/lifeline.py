"""A process of a run does not outlive the one that started it, whatever that one died of."""

import os
import signal
import threading
import time

POLL_S = 0.5


def die_with_parent() -> None:
    """Kill this process within a second once its parent is gone (SIGKILL leaves the parent no chance to do it)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
