"""Said before the first import of a package: that Concord's environment is not the one that Python runs in."""

import sys
from importlib.util import find_spec

NEEDED = ("hydra", "omegaconf", "pydantic", "yaml", "psutil", "rich", "filelock", "torch", "lightning")


def check_installed() -> None:
    """End the process, in one line, if it is run by a Python that does not have what Concord needs."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        print(
            f"{sys.executable} has no {absent[0]}: activate Concord's environment first, by `. .venv/bin/activate` in "
            "its folder; `make setup` makes it.",
            file=sys.stderr,
        )
        raise SystemExit(2)
