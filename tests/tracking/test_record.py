"""A record is read as it was written, or refused in one clear line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracking.examples import record, results
from tracking.record import RunRecord, environment, git_revision

RECORDS = Path(__file__).parent / "records"  # as a run of each version wrote them


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record()
    written.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == written
    assert json.loads((tmp_path / "record.json").read_text())["batch"]["global"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # no temporary file is left


def test_a_record_from_before_steps_could_be_skipped_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record().write(path)
    content = json.loads(path.read_text())
    del content["results"]["skipped_steps"]
    path.write_text(json.dumps(content))
    assert RunRecord.read(path).results.skipped_steps == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_record_of_each_version_is_read(version: int, tmp_path: Path) -> None:
    read = RunRecord.read(RECORDS / f"v{version}.json")
    assert (read.version, read.strategy, read.world_size, read.results.steps) == (version, "fsdp", 2, 8)
    assert read.results.tokens_per_s and read.results.val_loss
    traced = read.results.memory, read.results.traffic, read.results.wait_share, read.results.traced_steps
    assert all(traced) if version == 2 else not any(traced)
    read.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == read


def test_losses_that_are_no_numbers_survive_as_valid_json(tmp_path: Path) -> None:
    diverged = results(train_loss=math.nan, val_loss=math.inf, val_metrics={"val/loss": math.inf, "val/low": -math.inf})
    record(results=diverged).write(tmp_path / "record.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    read = RunRecord.read(tmp_path / "record.json").results
    assert read.train_loss is not None and math.isnan(read.train_loss)
    assert read.val_loss == math.inf
    assert read.val_metrics == {"val/loss": math.inf, "val/low": -math.inf}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version=3 is unknown, this Concord reads 1 and 2; update Concord."),
        ({"version": None}, "version=None is unknown"),
        ({"seed": "x"}, "is damaged: seed: Input should be a valid integer"),
        ({"speed": 1}, "is damaged: speed: Extra inputs are not permitted"),
    ],
)
def test_a_record_of_another_version_or_shape_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "record.json"
    record().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as caught:
        RunRecord.read(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", '{"version": 1, "run', "[1]", "\x00\x01"])
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"record\.json is damaged: .*; run that job again\.$"):
        RunRecord.read(path)


def test_the_environment_names_versions_but_neither_host_nor_user() -> None:
    here = environment(device_count=1)
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.torch.startswith("2.") and here.cores >= 1 and here.memory_gib > 0
    assert here.device
    assert set(type(here).model_fields).isdisjoint({"host", "hostname", "user"})


def test_a_revision_says_when_files_differ_from_it(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = git_revision(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("two")
    dirty = git_revision(tmp_path)
    assert dirty is not None and dirty.startswith(f"{clean}-dirty-")
    (tmp_path / "file").write_text("three")
    assert git_revision(tmp_path) not in (clean, dirty)  # another change is other code
    (tmp_path / "inner").mkdir()
    assert git_revision(tmp_path / "inner") is None


def test_reading_a_record_imports_no_torch() -> None:
    code = "import sys, tracking.record, tracking.sources, tracking.wandb_config; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
