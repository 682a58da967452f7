"""A run whose processes are killed again and again, at any moment, ends as the run that was left alone."""

from pathlib import Path

import pytest

from tests.kills import kill_and_compare


@pytest.mark.matrix
def test_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    assert kill_and_compare(tmp_path, count=20, seed=20) >= 4
