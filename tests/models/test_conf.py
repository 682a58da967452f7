"""Every YAML of conf/model, conf/optimizer and conf/scheduler is valid; a new one joins by itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import open_dict
from torch import nn

from launch.schema import WEIGHTS
from strategies.engines.extensions import ensure_built
from tests.tiers import in_tiers

CONF = Path(__file__).parents[2] / "conf"

# Published: GPT-2 (with tied embeddings), Llama 3 and 3.2 (Meta's model cards round them), ViT-B/16 (torchvision).
PARAMETERS = {
    "gpt_tiny": 1_049_728,
    "gpt_124m": 124_439_808,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "vit_b16": 86_567_656,
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def model_on_meta(name: str, *overrides: str) -> Any:
    data = "digits" if name.startswith("vit") else "synthetic"  # both state their sizes, whatever else is configured
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"model={name}", f"data={data}", *overrides])
    with open_dict(config):
        for key in WEIGHTS:  # Concord's own, not the constructor's
            del config.model[key]
    module = instantiate(config.model)
    module.configure_model()
    return module


@pytest.mark.parametrize("name", choices("model"))
def test_a_model_composes_and_is_built_on_meta(name: str) -> None:
    module = model_on_meta(name)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not list(module.buffers())
    chain = module.plan.expand(part for part, _ in module.net.named_modules())
    owned = [list(module.net.get_submodule(unit).parameters()) for unit in chain.modules]
    assert {id(p) for unit in owned for p in unit} == {id(p) for p in module.net.parameters()}
    for part in module.modules():
        assert not list(part.parameters(recurse=False)) or callable(part.reset_parameters)


@pytest.mark.parametrize("name", choices("model"))
def test_every_tensor_style_of_a_model_names_a_module(name: str) -> None:
    net = model_on_meta(name).net
    for pattern in net.plan.tensor:
        assert type(net.plan)(stem=(pattern,)).expand(part for part, _ in net.named_modules()).stem


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_a_published_size_has_exactly_its_parameters(name: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in model_on_meta(name).parameters()) == count


def test_gpt_small_is_about_10m_beside_its_tables() -> None:
    net = model_on_meta("gpt_small", "data.vocab_size=8192").net
    blocks = sum(parameter.numel() for parameter in net.blocks.parameters())
    assert (blocks, sum(p.numel() for p in net.parameters())) == (9_441_792, 9_441_792 + 384 + 2 * 8192 * 384)


@pytest.mark.parametrize("size", [8, 28])
def test_vit_tiny_takes_digits_and_mnist(size: int) -> None:
    net = model_on_meta("vit_tiny", f"data.image_size={size}").net
    assert net(torch.zeros(2, 1, size, size, device="meta")).shape == (2, 10)


# cpu_adamw has to be compiled first, where no earlier run has left it.
@pytest.mark.parametrize(
    "name", in_tiers(choices("optimizer"), [name for name in choices("optimizer") if name != "cpu_adamw"])
)
@pytest.mark.parametrize("schedule", choices("scheduler"))
def test_every_optimizer_and_schedule_steps(
    name: str, schedule: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "cpu_adamw":
        folder = tmp_path_factory.getbasetemp()
        compiler = folder / "c++"  # what it computes is the same unoptimized, and compiled in half the time
        compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0 -g0\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        ensure_built(["cpu_adam"])  # as a run does first: DeepSpeed would wait for a lock that a killed build has left
    module = model_on_meta("gpt_tiny", f"optimizer={name}", f"scheduler={schedule}")
    module.net = nn.Linear(2, 2)
    configured = module.configure_optimizers()
    before = module.net.weight.detach().clone()
    module.net(torch.ones(1, 2)).sum().backward()
    configured["optimizer"].step()
    configured["lr_scheduler"]["scheduler"].step()
    assert not torch.equal(module.net.weight, before)
    plain = (int, float, bool, str, list, tuple, type(None))
    assert all(isinstance(v, plain) for g in configured["optimizer"].state_dict()["param_groups"] for v in g.values())


@pytest.mark.parametrize(
    "path", [p for g in ("model", "optimizer", "scheduler") for p in (CONF / g).glob("*.yaml")], ids=str
)
def test_the_first_line_says_what_choosing_it_does(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


def test_a_misspelt_key_of_a_net_is_refused() -> None:
    with pytest.raises(TypeError, match="num_layer"):
        model_on_meta("gpt_tiny", "+model.net.num_layer=2")
