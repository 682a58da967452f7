"""What every test stands on: one thread per process, Ctrl-C, no W&B account, nothing of an outer run."""

import os
import signal

import pytest

# Before torch is imported: a process that has started OpenMP threads cannot fork ranks that compute.
os.environ["OMP_NUM_THREADS"] = "1"
# What a shell starts in the background ignores Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for name in [name for name in os.environ if name.startswith(("WANDB_", "TORCHELASTIC_", "SLURM_"))]:
    del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, so that two workers, who take a file at a time, end together."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
