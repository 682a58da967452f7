"""A process of a run does not outlive the one that started it, whatever that one died of."""

import os
import signal
import threading
import time
from collections.abc import Mapping

POLL_S = 0.5
PARENT = "CONCORD_PARENT"


def parented(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that is to die with this process."""
    return {**environment, PARENT: str(os.getpid())}


def die_with_parent() -> None:
    """Kill this process within a second once its parent is gone (SIGKILL leaves the parent no chance to do it).

    The parent's pid comes from the environment: one that died before this line is already replaced as our parent.
    """
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
