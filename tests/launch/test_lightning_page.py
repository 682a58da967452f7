"""docs/lightning.md says of Lightning's callbacks what the code does, and names tests that there are."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch import callbacks, loggers
from omegaconf import OmegaConf

from launch.callbacks import check_average, refusal
from launch.schema import build_spec
from strategies.spec import Strategy
from tests.presets import CONF, PRESETS

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/lightning.md").read_text()
NAMES = [path.stem for path in PRESETS]


class Row(NamedTuple):
    subject: str
    presets: str
    verdict: str
    proof: str

    @property
    def name(self) -> str | None:
        """Of the callback of Lightning's that it is about."""
        found = re.match(r"`(\w+)`", self.subject)
        return found[1] if found else None

    @property
    def strategies(self) -> list[str]:
        if self.presets.startswith("all"):
            return [name for name in NAMES if name not in self.presets.removeprefix("all but ").split(", ")]
        return self.presets.split(", ")


ROWS = [Row(*map(str.strip, line.strip("|").split(" | "))) for line in PAGE.splitlines() if line.count(" | ") == 3][1:]


@cache
def spec_of(strategy: str) -> Strategy:
    """By its file alone: a whole config takes a tenth of a second."""
    with initialize_config_dir(str(CONF / "strategy"), version_base="1.3"):
        return build_spec(cast(Any, OmegaConf.to_container(compose(strategy))), "strategy", Strategy)


def test_every_callback_has_one_verdict_under_every_preset() -> None:
    for name in callbacks.__all__:
        told = [strategy for row in ROWS if row.name == name for strategy in row.strategies]
        assert sorted(told) == sorted(NAMES), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.subject[:40]}-{row.verdict[:7]}")
def test_a_verdict_is_what_the_code_says(row: Row) -> None:
    assert row.verdict.startswith(("works", "refused"))
    for strategy in row.strategies if row.name else []:
        assert row.name is not None
        reason = refusal(row.name, spec_of(strategy))
        if row.verdict == "refused":
            assert f"{row.name} {reason}" == row.proof.replace("<preset>", strategy)
        else:
            assert reason is None


def test_the_average_is_refused_where_the_page_says_so() -> None:
    (row,) = (row for row in ROWS if "callbacks=ema" in row.subject and row.verdict == "refused")
    (strategy,) = row.strategies
    with pytest.raises(ValueError, match=f"^{re.escape(row.proof)}$"):
        check_average(spec_of(strategy))
    for other in set(NAMES) - {strategy}:
        check_average(spec_of(other))


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert named
    for path, name in named:
        assert f"def {name}(" in (REPOSITORY / path).read_text(), name
    assert all("::test_" in row.proof for row in ROWS if row.verdict.startswith("works"))


def test_every_logger_is_told_of() -> None:
    table = PAGE[PAGE.index("| logger of Lightning |") :]
    assert all(f"`{name}`" in table for name in loggers.__all__)
