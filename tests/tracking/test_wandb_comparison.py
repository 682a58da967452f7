"""A comparison in W&B: its page and certificates as artifacts, and a report, as `scripts/compare.py` sends them."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.tracking.examples import record, results
from tests.tracking.wandb_use import CERTIFICATE, ROOT, WANDB, environment, serve
from tracking.sources import read_runs
from tracking.wandb_config import Group, groups_of

COMPARE = [sys.executable, str(ROOT / "scripts" / "compare.py")]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of two runs in the group `night`; the second has a certificate."""
    for name, losses in (("single", "4.0\n2,3.0"), ("ddp", "4.0\n2,3.5")):
        write(tmp_path / "sweep" / name, name, mode="auto")
        (tmp_path / "sweep" / name / "metrics.csv").write_text(f"step,train/loss\n1,{losses}\n")
    (tmp_path / "sweep" / "ddp" / "certificate.json").write_text(json.dumps(CERTIFICATE))
    return tmp_path / "sweep"


def write(folder: Path, name: str, mode: str, group: str | None = "night") -> None:
    folder.mkdir(parents=True)
    logger: dict[str, Any] = {"project": "concord", "entity": None, "group": group, "mode": mode, "tags": []}
    fast = results(tokens_per_s=2000.0 if name == "ddp" else 1000.0)
    made = record(run_id=name, name=name, strategy=name, group=group, config={"logger": logger}, results=fast)
    made.write(folder / "record.json")


def compare(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(folder / "home", **variables)
    return subprocess.run([*COMPARE, *words], env=env, cwd=folder, capture_output=True, text=True, check=False)


def kept(variables: dict[str, str]) -> Any:
    with urllib.request.urlopen(f"{variables['WANDB_BASE_URL']}/kept") as answer:
        return json.load(answer)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    with serve(tmp_path / "uploads") as variables:
        yield variables


def check_artifacts(found: dict[str, Any], page: str, sweep: Path) -> None:
    (run,) = found["runs"].values()
    assert (run["group"], run["jobType"], run["displayName"], run["state"]) == ("night", "compare", "night", "finished")
    names = [(one["artifactTypeName"], one["artifactCollectionName"]) for one in found["artifacts"]]
    assert sorted(names) == [("certificate", "certificate-ddp"), ("comparison", "compare-night")]
    assert page in found["contents"]
    assert (sweep / "ddp" / "certificate.json").read_text() in found["contents"]


def test_page_and_certificates_become_artifacts_in_the_group_of_the_runs(
    tmp_path: Path, sweep: Path, server: dict[str, str]
) -> None:
    done = compare(tmp_path, str(sweep), "--wandb", **server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{server['WANDB_BASE_URL']}/team/concord/runs/")
    check_artifacts(kept(server), (sweep / "compare.html").read_text(), sweep)


@pytest.mark.full
def test_offline_they_wait_in_the_folder_and_arrive_by_sync(
    tmp_path: Path, sweep: Path, server: dict[str, str]
) -> None:
    done = compare(tmp_path, str(sweep), "--wandb")
    assert (done.returncode, done.stderr) == (0, "")
    _, _, command = done.stdout.splitlines()[-1].partition("upload it by: ")
    (run,) = (sweep / "wandb").glob("offline-run-*")
    assert command == f"wandb sync {run}"
    assert not any((tmp_path / "home").rglob("*.html"))  # nothing of it lies elsewhere
    page = (sweep / "compare.html").read_text()
    (sweep / "compare.html").write_text("of other runs")  # written again before it is uploaded
    env = environment(tmp_path / "home", **server)
    subprocess.run([str(WANDB), "sync", str(run)], env=env, cwd=tmp_path, capture_output=True, check=True, timeout=60)
    check_artifacts(kept(server), page, sweep)


@pytest.mark.full
def test_of_runs_that_w_and_b_does_not_have_none_are_made(tmp_path: Path) -> None:
    write(tmp_path / "alone", "alone", mode="disabled")
    done = compare(tmp_path, "alone", "--wandb")
    line = "--wandb: W&B does not have these runs, they were made with logger=none.\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not (tmp_path / "alone" / "wandb").exists()


@pytest.mark.full
@pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="the extra `report` is not installed")
def test_a_report_has_our_words_our_table_and_charts_of_the_group(
    tmp_path: Path, sweep: Path, server: dict[str, str]
) -> None:
    done = compare(tmp_path, str(sweep), "--wandb-report", **server)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(f"wrote {server['WANDB_BASE_URL']}/team/concord/reports/")
    (sent,) = kept(server)["reports"]
    assert (sent["entityName"], sent["projectName"]) == ("team", "concord")
    assert sent["displayName"] == "Comparison: ddp and single"
    blocks = json.loads(sent["spec"])["blocks"]
    said = json.dumps(blocks)
    assert "ddp is the fastest at 2,000 tokens/s on 2 devices, 2.00 times single's" in said
    assert "ranks are processes that share 2 cores" in said  # a warning
    table = next(block["content"] for block in blocks if block["type"] == "markdown-block").splitlines()
    assert table[0].startswith("| run | ranks | train loss |") and len(table) == 4
    assert table[2].startswith("| ddp | 2 | 2.2500 |")

    (grid,) = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    (runs,) = grid["runSets"]
    assert (runs["project"]["entityName"], runs["project"]["name"]) == ("team", "concord")
    (group, job_type) = runs["filters"]["filters"]
    assert (group["key"]["name"], group["op"], group["value"]) == ("group", "IN", ["night"])
    assert (job_type["key"]["name"], job_type["op"], job_type["value"]) == ("jobType", "!=", "compare")
    assert runs["grouping"] == [{"section": "run", "name": "jobType"}]
    panels = [(panel["viewType"], panel["config"]) for panel in grid["panelBankSectionConfig"]["panels"]]
    lines = [(one["metrics"][0], one["xAxis"]) for kind, one in panels if kind == "Run History Line Plot"]
    assert lines == [(loss, axis) for loss in ("train/loss", "val/loss") for axis in ("step", "tokens", "time_s")]
    bars = [one["metrics"] for kind, one in panels if kind == "Bar Chart"]
    assert (bars[0], bars[-1]) == (["record/tokens_per_s"], ["mem/peak_gib"])


@pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="the extra `report` is not installed")
@pytest.mark.parametrize(
    ("group", "line"),
    [
        (None, "The runs are in no group of W&B; start them as a sweep, or with logger.group=<name>."),
        ("night", "--wandb-report: no API key for http://127.0.0.1:9; `wandb login` stores one, or set WANDB_API_KEY."),
    ],
)
def test_what_a_report_cannot_be_made_of_is_one_line(tmp_path: Path, group: str | None, line: str) -> None:
    write(tmp_path / "alone", "alone", mode="offline", group=group)
    done = compare(tmp_path, "alone", "--wandb-report", WANDB_BASE_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stderr) == (2, f"{line}\n")


def test_groups_are_those_that_are_named_and_those_that_folders_say(sweep: Path) -> None:
    runs = read_runs(sweep)
    mine, theirs = Group(None, "concord", "night"), Group("team", "concord", "day")
    assert groups_of([str(sweep)], runs) == [mine]
    assert groups_of(["wandb:team/concord/day"], []) == [theirs]
    with pytest.raises(ValueError, match="are not of one project; make a report of each"):
        groups_of(["wandb:team/concord/day", str(sweep)], runs)


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    blocked = "import runpy, sys; sys.modules['wandb_workspaces'] = None; sys.argv = sys.argv[1:]"
    program = f"{blocked}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, *COMPARE[1:], "sweep", "--wandb-report"]
    done = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False)
    line = "--wandb-report needs wandb-workspaces; do: pip install wandb-workspaces\n"
    assert (done.returncode, done.stderr) == (2, line)
