"""Meshes, precisions and presets, before any process exists."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate

from launch.compose import compose
from strategies.spec import Mesh, Precision, Run, Strategy, Transfer
from tests.presets import CONF, PRESETS

PRECISIONS = sorted((CONF / "precision").glob("*.yaml"))
FP32 = Precision(name="fp32", parameter="float32", compute="float32", reduce="float32", master="float32")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_is_a_spec_that_bears_its_files_name(path: Path) -> None:
    strategy = instantiate(compose([f"strategy={path.stem}"])["strategy"], _convert_="all")
    assert isinstance(strategy, Strategy)
    assert strategy.name == path.stem
    run = Run(precision=FP32, seed=1, accelerator="cpu", timeout_s=60, micro_batch_size=8)
    replace(strategy, mesh=strategy.mesh.resolve(None, strategy.rehearsal_ranks)).check(run)


@pytest.mark.parametrize("path", PRECISIONS, ids=lambda path: path.stem)
def test_precision_bears_its_files_name_and_lightning_knows_it(path: Path) -> None:
    from strategies.engines.precision import precision_plugin

    precision = instantiate({"_target_": "strategies.spec.Precision", **yaml.safe_load(path.read_text())})
    assert precision.name == path.stem
    if precision.compute != "float16":  # its loss scaler needs a GPU
        # MasterWeights is "bf16-true" for Lightning, too: what the optimizer works on, it does not name.
        assert precision_plugin(precision, "cpu").precision == precision.lightning


@pytest.mark.parametrize("path", [*CONF.glob("*/*.yaml"), CONF / "config.yaml"], ids=lambda path: path.name)
def test_first_line_says_what_choosing_it_does(path: Path) -> None:
    # Hydra wants a recipe's `# @package` before anything else.
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ")
    assert len(first.split()) > 4


def test_open_axis_takes_what_is_left_of_the_world() -> None:
    assert Mesh(data="auto", tensor=2).resolve(8) == Mesh(data=4, tensor=2)
    assert Mesh(data="auto").resolve(None).world_size == 2
    assert Mesh(pipe=2, data="auto", tensor=2).resolve(None).world_size == 8


def test_closed_mesh_leaves_further_devices_idle() -> None:
    assert Mesh().resolve(4).world_size == 1


@pytest.mark.parametrize(
    ("mesh", "devices", "words"),
    [
        (Mesh(data="auto", tensor=2), 3, ["launcher.devices=3", "multiple of 2", "4"]),
        (Mesh(data=4), 2, ["launcher.devices=2", "4"]),
        (Mesh(pipe="auto", data="auto"), 4, ["pipe and data"]),
    ],
)
def test_mesh_that_does_not_fit_is_refused(mesh: Mesh, devices: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:  # its words are checked one by one
        mesh.resolve(devices)
    assert all(word in str(refusal.value) for word in words)


def test_mixed_precision_without_a_plugin_is_refused() -> None:
    from strategies.engines.precision import precision_plugin

    odd = Precision(name="odd", parameter="float16", compute="float16", reduce="float16", master="float16")
    with pytest.raises(ValueError, match="precision=odd"):
        precision_plugin(odd, "cpu")


@pytest.mark.parametrize(
    ("collective", "expected"),
    [
        ("all_reduce", 150.0),
        ("all_gather", 75.0),
        ("reduce_scatter", 75.0),
        ("all_to_all", 75.0),
        ("broadcast", 100.0),
        ("reduce", 100.0),
        ("send", 100.0),
        ("recv", 0.0),
    ],
)
def test_wire_bytes_of_100_bytes_over_4_ranks(collective: Any, expected: float) -> None:
    assert Transfer(collective=collective, axis="data", ranks=4, payload=100).wire_bytes == expected
    if collective not in ("send", "recv"):
        assert Transfer(collective=collective, axis="data", ranks=1, payload=100).wire_bytes == 0.0
