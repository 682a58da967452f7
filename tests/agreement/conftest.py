"""References that all agreement tests share."""

import os
from collections.abc import Callable
from functools import cache
from hashlib import sha256

import pytest
from filelock import FileLock

from tests.agreement.cases import Case
from tests.agreement.training import train_case
from tracking.agreement import Draw
from tracking.evidence import Evidence


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, int], Draw]:
    """The references of a case, on micro-batches of a size: each trained once for all tests, and by one worker."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "references"
    shared.mkdir(exist_ok=True)

    @cache
    def train_once(*overrides: str) -> Evidence:
        folder = shared / sha256("\0".join(overrides).encode()).hexdigest()[:16]
        trained = folder / "trained"
        with FileLock(folder.with_suffix(".lock")):
            if trained.exists():
                return Evidence.load(folder)
            evidence = train_case(list(overrides), folder)
            trained.touch()
            return evidence

    def draw(case: Case, micro_batch_size: int) -> Draw:
        size = f"data.micro_batch_size={micro_batch_size}"
        return Draw(train_once(*case.exact_overrides, size), train_once(*case.reference_overrides, size))

    return draw
