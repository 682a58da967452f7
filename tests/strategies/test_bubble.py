"""The waiting that a schedule is said to cost is the waiting that is measured.

Not speed is tested here, but time: blocks sleep for a known time instead of computing, so that ranks overlap on however
few cores, and a step's time over the time of its work says how well the engine keeps to its schedule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from launch.job import Job
from launch.worker import train
from strategies.grid import Grid
from strategies.schedules import Name
from tests.agreement.training import job_of
from tests.harness import run_ranks
from tests.strategies.sleeping import Clock, Setting

TOLERANCE = 0.1
MORE_TRIES = 2  # what else the machine does can only make a step of sleeps longer: the shortest counts

pytestmark = pytest.mark.alone


NAIVE = Setting(schedule="gpipe", ranks=2, micro_batches=1, strategy="model_parallel")
COMPARED: tuple[Name, ...] = ("1f1b", "interleaved_1f1b", "zbv")
SETTINGS = [
    Setting(schedule=schedule, ranks=ranks, micro_batches=micro_batches)
    for ranks in (2, 4)
    for schedule in ("gpipe", "1f1b")
    for micro_batches in (1, 4, 8)
] + [
    NAIVE,
    *(Setting(schedule=schedule, ranks=2, micro_batches=4) for schedule in COMPARED[1:]),
]
Ratios = Mapping[Setting, float]


def train_timed(jobs: Sequence[Job]) -> None:
    for job in jobs:
        train(job, callbacks=[Clock()])


def measure(settings: Sequence[Setting], folder: Path) -> dict[Setting, float]:
    """Shortest step over the time of its work; the settings are of one number of ranks, which take them in turn.

    The shortest, because whatever else the machine does can only make a step of sleeps longer.
    """
    jobs = {setting: job_of(setting.overrides, folder / str(setting)) for setting in settings}
    run_ranks(settings[0].ranks, folder, train_timed, list(jobs.values()))
    ratios = {}
    for setting, job in jobs.items():
        ends = json.loads((job.run_dir / "ends.json").read_text())
        ratios[setting] = min(end - begin for begin, end in pairwise(ends)) / setting.work_s
    return ratios


def theory(setting: Setting, folder: Path) -> float:
    grid = job_of(setting.overrides, folder).strategy
    assert isinstance(grid, Grid)
    return 1 / (1 - grid.bubble())


@pytest.fixture(scope="module")
def ratios(tmp_path_factory: pytest.TempPathFactory) -> Ratios:
    """All settings of a schedule by the same processes: to start them takes longer than most of the steps."""
    found: dict[Setting, float] = {}
    for _, same in groupby(SETTINGS, lambda setting: (setting.ranks, setting.schedule)):
        found |= measure(list(same), tmp_path_factory.mktemp("ranks"))
    return found


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_step_takes_as_long_as_its_schedule_says(setting: Setting, ratios: Ratios, tmp_path: Path) -> None:
    expected = pytest.approx(theory(setting, tmp_path / "theory"), rel=TOLERANCE)
    found = ratios[setting]
    for more in range(MORE_TRIES):
        if found != expected:
            found = min(found, measure([setting], tmp_path / str(more))[setting])
    assert found == expected


def test_naive_split_takes_as_long_as_one_rank_would(tmp_path: Path) -> None:
    assert theory(NAIVE, tmp_path) == NAIVE.ranks


def test_interleaved_stages_take_less_time_than_1f1b_and_split_backwards_less_still(ratios: Ratios) -> None:
    plain, interleaved, split = (ratios[Setting(schedule=schedule, ranks=2, micro_batches=4)] for schedule in COMPARED)
    assert split < interleaved < plain
