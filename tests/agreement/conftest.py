"""References that all agreement tests share."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.agreement.cases import Case
from tests.agreement.test_agreement import train_case
from tracking.evidence import Evidence


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Evidence, Evidence]]:
    """(exact, reference) of a case, each trained once for all tests."""

    @cache
    def train_once(*overrides: str) -> Evidence:
        return train_case(list(overrides), tmp_path_factory.mktemp("reference"))

    return lambda case: (train_once(*case.exact_overrides), train_once(*case.reference_overrides))
