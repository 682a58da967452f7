"""The real W&B client against no server, a dead one, a mute one and one that dies; read back with W&B's own tool."""

import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.tracking.examples import record
from tests.tracking.wandb_use import KEY, WANDB, Done, Program, environment, programs, records_of, serve, summary_of
from tracking.wandb_config import WandbConfig
from tracking.wandb_run import choose_mode, has_api_key


def seconds(done: Done, what: str) -> float:
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith(what)))


def told(done: Done) -> list[str]:
    """Lines on stderr, all of which must be ours."""
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with programs(tmp_path_factory.getbasetemp()) as run:
        yield run


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, train: Program) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("offline")
    return folder, train(folder)


Offline = tuple[Path, Done]


def test_without_a_key_the_run_is_offline_and_says_nothing(offline: Offline) -> None:
    folder, done = offline
    assert told(done) == []
    assert [path.name[:11] for path in (folder / "run" / "wandb").glob("*run-*")] == ["offline-run"]


def test_group_job_type_name_tags_and_config_are_there(offline: Offline) -> None:
    summary, records = summary_of(offline[0]), records_of(offline[0])
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["job_type"]) == ("concord", "sweep-7", "ddp")
    assert (run["display_name"], run["tags"]) == ("first", ["from-config", "from-caller"])
    assert summary["config"] == {
        "seed": 1,
        "data": {"tokenizer": "bytes", "hf_token": "***", "tokens_per_sample": 64},
        "mirror": "https://***@example.com/data?token=***",
        "width": 8,
        "password": "***",
    }
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)


def test_every_row_has_its_step_and_tokens(offline: Offline) -> None:
    records = records_of(offline[0])
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    times = [row.pop("time_s") for row in rows]
    assert times == sorted(times) and times[0] >= 0 and times[-1] < offline[1].wall_s
    assert rows == [
        {"train/loss": 3.5, "perf/tokens_per_s": 1000, "step": 1, "tokens": 1024},
        {"val/loss": 2, "step": 1, "tokens": 1024},
        {"train/loss": 1.25, "step": 2, "tokens": 2048},
        {"val/loss": 2.5, "step": 2, "tokens": 2048},
    ]
    metrics = {record["metric"].get("name", "*"): record["metric"] for record in records if record["type"] == "metric"}
    for name in ("*", "val/loss", "perf/tokens_per_s"):
        assert metrics[name]["step_metric"] == "step"
    for axis in ("step", "tokens", "time_s"):
        assert metrics[axis]["options"]["hidden"] is True


def test_the_summary_is_the_record_the_least_validation_loss_and_the_mean_throughput(offline: Offline) -> None:
    summary = summary_of(offline[0])["summary"]
    results = record().results.model_dump(mode="json")
    assert {key: summary.get(f"record/{key}") for key in results} == results  # W&B's reader leaves out what is null
    assert summary["val/loss"] == {"min": 2}
    assert summary["perf/tokens_per_s"] == {"mean": 1000}
    assert summary["train/loss"] == 1.25


def test_a_row_that_is_no_number_does_not_spoil_the_summary(tmp_path: Path, train: Program) -> None:
    train(tmp_path, accident="numbers fail")
    summary = summary_of(tmp_path)["summary"]
    assert (summary["val/loss"], summary["perf/tokens_per_s"]) == ({"min": 1.5}, {"mean": 2000})


def test_no_secret_is_in_any_byte_of_the_run(offline: Offline) -> None:
    files = [path for path in (offline[0] / "run" / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert b"SECRET" not in path.read_bytes(), path


def test_the_record_the_trace_and_the_certificate_are_with_the_run_and_will_be_uploaded(offline: Offline) -> None:
    (kept,) = (offline[0] / "run" / "wandb").glob("offline-run-*/files")
    names = {"record.json", "trace.json", "certificate.json"}
    for name in names:
        assert not (kept / name).is_symlink()
        assert (kept / name).read_bytes() == (offline[0] / "run" / name).read_bytes()
    assert not (kept / "resolved.yaml").exists()
    listed = [file for one in records_of(offline[0]) if one["type"] == "files" for file in one["files"]["files"]]
    assert names <= {file["path"] for file in listed}


@pytest.mark.full
def test_a_failed_run_is_marked_as_failed(tmp_path: Path, train: Program) -> None:
    train(tmp_path, accident="run fails")
    assert summary_of(tmp_path)["exit_code"] == 1


def test_a_disabled_run_leaves_nothing(tmp_path: Path, train: Program) -> None:
    done = train(tmp_path, mode="disabled")
    assert told(done) == [] and list((tmp_path / "run").iterdir()) == []


def check_fallback(folder: Path, done: Done, host: str, reason: str) -> None:
    (line,) = told(done)
    assert line.startswith(f"W&B: {host} cannot be used (") and reason in line
    assert "goes on offline" in line and KEY not in line
    assert seconds(done, "start") < 30
    assert done.wall_s - seconds(done, "start") - seconds(done, "finish") < 10  # its exit waits for nobody
    (run,) = (folder / "run" / "wandb").glob("*run-*")
    assert line.endswith(f"wandb sync {run}")
    assert summary_of(folder)["summary"]["train/loss"] == 1.25
    assert not any(KEY.encode() in path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file())


@pytest.mark.full
def test_a_host_that_refuses_costs_one_line_and_the_run_goes_on_offline(tmp_path: Path, train: Program) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = train(tmp_path, WANDB_BASE_URL=host, WANDB_API_KEY=KEY)
    check_fallback(tmp_path, done, host, "connection refused")


@pytest.mark.full
def test_a_host_that_never_answers_costs_one_line_and_the_run_goes_on_offline(tmp_path: Path, train: Program) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(50)
        host = f"http://127.0.0.1:{mute.getsockname()[1]}"
        done = train(tmp_path, WANDB_BASE_URL=host, WANDB_API_KEY=KEY)
    check_fallback(tmp_path, done, host, "Timed out")


@pytest.mark.full
@pytest.mark.parametrize(
    ("variables", "reason"), [({"WANDB_API_KEY": "short"}, "API key must have 40+ characters"), ({}, "no API key")]
)
def test_a_key_that_is_wrong_or_missing_costs_one_line(
    tmp_path: Path, train: Program, variables: dict[str, str], reason: str
) -> None:
    host = "http://127.0.0.1:9"
    done = train(tmp_path, mode="online", WANDB_BASE_URL=host, **variables)
    check_fallback(tmp_path, done, host, reason)


@pytest.mark.full
def test_a_key_that_the_server_refuses_costs_one_line(tmp_path: Path, train: Program) -> None:
    with serve(tmp_path / "uploads", status=401) as variables:
        done = train(tmp_path, **variables)
    check_fallback(tmp_path, done, variables["WANDB_BASE_URL"], "user is not logged in")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    with serve(tmp_path / "uploads") as variables:
        yield variables


def test_with_a_key_and_a_server_the_run_is_online(tmp_path: Path, train: Program, server: dict[str, str]) -> None:
    done = train(tmp_path, **server)
    (line,) = told(done)
    assert line.startswith(f"W&B: {server['WANDB_BASE_URL']}/team/concord/runs/")
    uploads = (tmp_path / "uploads").read_text()
    assert "train/loss" in uploads and "record/val_loss" in uploads and "sweep-7" in uploads
    assert "SECRET" not in uploads


@pytest.mark.full
def test_a_server_lost_on_the_way_neither_fails_nor_holds_the_run_and_it_can_be_synced_later(
    tmp_path: Path, train: Program, server: dict[str, str]
) -> None:
    done = train(tmp_path, accident="server dies", **server)
    address, line = told(done)[0], told(done)[-1]
    assert address.startswith("W&B: http")
    assert seconds(done, "finish") < 3 + 5
    assert line.startswith("W&B: the run is not all uploaded (")
    assert summary_of(tmp_path)["summary"]["record/val_loss"] == 2.5  # all of it is on disk
    command = shlex.split(line.partition("do later: ")[2])
    assert command[:3] == ["wandb", "sync", "--include-online"]
    with serve(tmp_path / "later") as variables:
        env = environment(tmp_path / "home", **variables)
        synced = subprocess.run(
            [str(WANDB), *command[1:]], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
    assert synced.returncode == 0, synced.stderr
    assert "record/val_loss" in (tmp_path / "later").read_text()


@pytest.mark.full
@pytest.mark.parametrize(("accident", "bound_s"), [("service dies", 5.0), ("service hangs", 16.0)])
def test_the_loss_of_wandb_s_own_service_neither_fails_nor_holds_the_run(
    tmp_path: Path, train: Program, accident: str, bound_s: float
) -> None:
    done = train(tmp_path, accident=accident)
    assert seconds(done, "finish") < bound_s
    lost, last = ("W&B: its own process is gone (", "W&B: the run is not all uploaded (")
    assert [line.startswith(start) for line, start in zip(told(done), (lost, last), strict=False)]
    assert told(done)[-1].startswith(last) and len(told(done)) <= 2


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without anything of W&B's; its settings, which it reads once, are read anew."""
    for key in list(os.environ):
        if key.startswith("WANDB"):
            monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)  # where W&B's client leaves its own log
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def test_auto_follows_wandb_mode_and_a_choice_in_the_config_goes_first(isolated: pytest.MonkeyPatch) -> None:
    assert choose_mode(WandbConfig()) == "offline"
    for value, mode in {"online": "online", "dryrun": "offline", "disabled": "disabled"}.items():
        isolated.setenv("WANDB_MODE", value)
        assert choose_mode(WandbConfig()) == mode
        assert choose_mode(WandbConfig(mode="offline")) == "offline"
    isolated.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE=sometimes is no mode of W&B; set it to one of online, run, "):
        choose_mode(WandbConfig())


def test_a_key_makes_auto_go_online(isolated: pytest.MonkeyPatch) -> None:
    isolated.setenv("WANDB_API_KEY", KEY)
    assert choose_mode(WandbConfig()) == "online"


@pytest.mark.parametrize(("host", "found"), [("wandb.example.com", True), ("other.example.com", False)])
def test_a_key_in_netrc_counts_for_the_configured_host_alone(
    isolated: pytest.MonkeyPatch, tmp_path: Path, host: str, found: bool
) -> None:
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    assert has_api_key() is found
