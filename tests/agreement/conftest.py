"""References that all agreement tests share."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.agreement.cases import Case
from tests.agreement.training import train_case
from tracking.agreement import Draw
from tracking.evidence import Evidence


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, int], Draw]:
    """The references of a case, on micro-batches of a size: each trained once for all tests."""

    @cache
    def train_once(*overrides: str) -> Evidence:
        return train_case(list(overrides), tmp_path_factory.mktemp("reference"))

    def draw(case: Case, micro_batch_size: int) -> Draw:
        size = f"data.micro_batch_size={micro_batch_size}"
        return Draw(train_once(*case.exact_overrides, size), train_once(*case.reference_overrides, size))

    return draw
