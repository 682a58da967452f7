"""Rules between keys that need a machine or a launcher that is not here: the border is what nvidia-smi answers."""

import subprocess
from pathlib import Path

import pytest
import yaml

from launch import hardware, job
from launch.compose import compose
from launch.job import resolve
from launch.join import tasks_of_node
from launch.schema import ConfigError, validate

ANSWER = "0, GPU-aa11, NVIDIA T4, 7.5\n1, GPU-bb22, NVIDIA A100-SXM4-80GB, 8.0\n"
T4, A100 = hardware.parse(ANSWER)


@pytest.mark.parametrize("path", sorted(Path(__file__).with_name("resolved").iterdir()), ids=lambda path: path.stem)
def test_the_config_of_an_older_run_is_still_read(path: Path) -> None:
    config = validate(yaml.safe_load(path.read_text()))
    assert config.strategy["name"] == "zero1" and config.trainer.trace_steps == 0


def refusal(*overrides: str, **joined: int) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(validate(compose(list(overrides))), **joined)
    return str(error.value)


def test_more_devices_than_gpus_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "gpus", lambda: (A100,))
    assert "has 1 GPU; set launcher.devices=1" in refusal("strategy=ddp", "launcher.devices=2")


def test_every_gpu_is_used_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "gpus", lambda: (A100, A100))
    config = resolve(validate(compose(["strategy=ddp", "precision=bf16"])))
    assert (config.launcher.accelerator, config.launcher.devices) == ("gpu", 2)
    alone = resolve(validate(compose(["strategy=single"])))
    assert alone.launcher.devices == 1


def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "gpus", lambda: (T4,))
    line = refusal("precision=bf16")
    assert "NVIDIA T4" in line
    assert "precision=fp16 optimizer.fused=false" in line


def test_fused_optimizer_is_refused_under_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "gpus", lambda: (T4,))
    assert "set optimizer.fused=false" in refusal("precision=fp16")
    resolve(validate(compose(["precision=fp16", "optimizer.fused=false"])))


def test_ranks_of_another_launcher_need_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "gpus", lambda: (A100,))
    assert "started 4 ranks on this machine" in refusal("strategy=ddp", world_size=4, local_world_size=4)


def test_devices_that_contradict_another_launcher_are_refused() -> None:
    line = refusal("strategy=ddp", "launcher.devices=2", "launcher.accelerator=cpu", world_size=4, local_world_size=4)
    assert "launcher.devices=2" in line


@pytest.mark.parametrize(
    ("entries", "shown"),
    [
        (None, (T4, A100)),
        ("", ()),
        ("1", (A100,)),
        ("1,0", (A100, T4)),
        ("0,-1,1", (T4,)),
        ("GPU-bb", (A100,)),
        ("7", ()),
        ("MIG-3f0a", (T4,)),
    ],
)
def test_visible_gpus_are_those_that_cuda_shows(entries: str | None, shown: tuple[hardware.Gpu, ...]) -> None:
    assert hardware.visible((T4, A100), entries) == shown


@pytest.mark.parametrize(("node", "tasks"), [(0, 2), (2, 2), (3, 1)])
def test_slurm_says_how_many_tasks_a_node_has(node: int, tasks: int) -> None:
    assert tasks_of_node("2(x3),1", node) == tasks


@pytest.mark.parametrize(("driver", "is_refused"), [("470.82.01", True), ("525.60.13", False), ("", False)])
def test_driver_that_is_older_than_the_wheel_is_refused(
    driver: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setattr(hardware, "find_torch", lambda: tmp_path)
    answer = subprocess.CompletedProcess([], 0, f"{driver}\n{driver}\n", "")
    monkeypatch.setattr(hardware.subprocess, "run", lambda *args, **kwargs: answer)
    if not is_refused:
        hardware.check_driver()
        return
    with pytest.raises(ValueError, match=r"the driver is 470.82.01, .* CUDA 12, which needs 525 or newer; update"):
        hardware.check_driver()
