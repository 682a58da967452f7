"""A record is read as it was written, or refused in one clear line."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pydantic
import pytest

from tests.tracking.examples import record, results
from tracking.record import RunRecord, environment
from tracking.revision import git_revision, source_digest

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


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository of one commit."""
    (tmp_path / "file").write_text("one")
    (tmp_path / ".gitignore").write_text("*.log\n__pycache__\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "one"]):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)
    return tmp_path


def test_a_revision_says_when_files_differ_from_it(repository: Path) -> None:
    clean = git_revision(repository)
    assert clean is not None and len(clean) == 40
    (repository / "file").write_text("two")
    dirty = git_revision(repository)
    assert dirty is not None and dirty.startswith(f"{clean}-dirty-")
    (repository / "file").write_text("three")
    assert git_revision(repository) not in (clean, dirty)  # another change is other code
    (repository / "inner").mkdir()
    assert git_revision(repository / "inner") is None


@pytest.mark.parametrize("name", ["models/mine.py", "datamodules/mine/set.py", "conf/model/mine.yaml"])
def test_a_revision_knows_of_files_that_git_has_not_been_told_of(name: str, repository: Path) -> None:
    clean, path = git_revision(repository), repository / name
    path.parent.mkdir(parents=True)
    path.write_text("first")
    added = git_revision(repository)
    assert clean is not None and added is not None and added.startswith(f"{clean}-dirty-")
    path.write_text("second")
    assert git_revision(repository) not in (clean, added)


@pytest.mark.parametrize("name", ["models/run.log", "models/__pycache__/mine.py", "models/weights.pt", "notes.py"])
def test_a_revision_leaves_out_what_is_no_source_of_a_run(name: str, repository: Path) -> None:
    clean, path = git_revision(repository), repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("anything")
    assert git_revision(repository) == clean


def imported(name: str, path: Path) -> dict[str, ModuleType]:
    module = ModuleType(name)
    module.__file__ = str(path)
    return {name: module}


def test_the_digest_of_the_source_follows_what_a_user_s_module_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("loss = 1")
    first = source_digest(imported("mine", path))
    assert source_digest(imported("mine", path)) == first != source_digest({})
    path.write_text("loss = 3")
    assert source_digest(imported("mine", path)) != first


@pytest.mark.parametrize("name", ["tracking.mine", "launch.mine", "scripts.mine"])
def test_the_digest_of_the_source_leaves_out_concord_s_engine_room(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("")
    assert source_digest(imported(name, path)) == source_digest({})


def test_the_digest_of_the_source_leaves_out_what_is_installed_and_what_that_makes(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text("")
    loaded = {"pydantic": pydantic, "json": json} | imported("pydantic.made", kernel)
    assert source_digest(loaded) == source_digest({})


def test_reading_a_record_imports_no_torch() -> None:
    code = "import sys, tracking.record, tracking.sources, tracking.wandb_config; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
