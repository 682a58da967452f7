"""A family of cases in two tiers: those that stand for it are everyday, the others are marked `full`."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def in_tiers(cases: Sequence[Any], everyday: Collection[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`; a case that is a tuple gives several arguments."""
    assert all(case in cases for case in everyday), "what stands for a family is one of it"
    return [case if case in everyday else marked(case) for case in cases]


def marked(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.full)
