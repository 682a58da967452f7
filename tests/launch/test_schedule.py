"""A run that goes on has its schedule where it was, to the bit; what cannot be had again is told at the start."""

from pathlib import Path

import pytest

from strategies.checkpoint import Manifest, folder_of
from tests.agreement.cases import Case, own
from tests.agreement.test_agreement import train_case
from tests.agreement.test_freedom import same

SAVED = 2  # of four optimizer steps; every one is validated


def words_of(kind: str, **case: object) -> list[str]:
    made: Case = own("x", **{"strategy": "single", "world_size": 1, **case})
    named = [word for word in made.overrides if not word.startswith(("model._target_", "trainer.val_every"))]
    target = "model._target_=tests.launch.scheduling.Scheduled"
    return [*named, target, f"+model.kind='{kind}'", "trainer.val_every_steps=1"]


KINDS = ["sequential", "chained", "nested", "one cycle", "cyclic", "exponential", "several", "multiplied", "own"]


@pytest.mark.parametrize("kind", [*KINDS, "plateau"])
def test_schedule_goes_on_as_if_nothing_had_been(kind: str, tmp_path: Path) -> None:
    whole = train_case([*words_of(kind), f"checkpoint.every_steps={SAVED}"], tmp_path / "whole")
    folder = folder_of(tmp_path / "whole", SAVED)
    after = train_case([*words_of(kind), f"resume='{folder}'", "checkpoint.at_end=true"], tmp_path / "after")
    assert same(after, whole)
    assert states(tmp_path / "after") == states(tmp_path / "whole")


def states(run_dir: Path) -> list[dict]:
    return Manifest.read(folder_of(run_dir, 4)).schedulers
