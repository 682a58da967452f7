"""ModelStats counts exactly, for any LightningModule, without allocating."""

import resource
import sys
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.language import LanguageModel
from models.nets.gpt import GPT
from models.nets.vit import ViT
from models.plan import ParallelPlan
from models.stats import Passed, measure
from models.task import Task
from models.vision import ImageClassifier

LENGTH = 16
GPT_SHAPE: dict[str, Any] = {
    "vocab_size": 61, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "mlp_size": 48
}  # fmt: skip
VIT_SHAPE: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "num_channels": 3, "num_classes": 10, "num_layers": 3, "num_heads": 4,
    "hidden_size": 32, "mlp_size": 48,
}  # fmt: skip
TOKENS = torch.zeros(1, LENGTH + 1, dtype=torch.long)
IMAGE = (torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))


def language(**changes: Any) -> LanguageModel:
    return LanguageModel(net=partial(GPT, **(GPT_SHAPE | changes)), optimizer=partial(SGD, lr=0.1), scheduler=None)


def vision() -> ImageClassifier:
    return ImageClassifier(net=partial(ViT, **VIT_SHAPE), optimizer=partial(SGD, lr=0.1), scheduler=None)


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def on_meta(module: LightningModule) -> LightningModule:
    module.configure_model()
    return module


def counted_on_cpu(module: Task, sample: Any) -> int:
    """FLOPs of a real step, with attention written out: the counter does not know the CPU's fused kernel."""
    module.configure_model()
    module.to_empty(device="cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss: Any = module.training_step(sample, 0)
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "shape", [{}, {"num_kv_heads": 4, "tie_embeddings": True, "mlp": "gelu"}], ids=["llama", "tied"]
)
def test_flops_of_a_gpt_are_those_of_a_real_step_and_of_the_closed_form(shape: dict[str, Any]) -> None:
    flops = measure(on_meta(language(**shape)), TOKENS).flops_per_sample
    assert flops == counted_on_cpu(language(**shape), TOKENS)
    net = GPT(**(GPT_SHAPE | shape))
    products = sum(part.weight.numel() for part in net.modules() if isinstance(part, nn.Linear))
    # Per token 6 per weight, and per layer and key 12 per hidden unit (Chowdhery et al. 2022, appendix B).
    assert flops == LENGTH * (6 * products + 12 * 3 * LENGTH * 32)


def test_flops_of_a_vit_are_those_of_a_real_step_and_of_the_closed_form() -> None:
    flops = measure(on_meta(vision()), IMAGE).flops_per_sample
    assert flops == counted_on_cpu(vision(), IMAGE)
    tokens, block = 1 + 16, 4 * 32 * 32 + 2 * 32 * 48
    patches = 4 * 16 * 32 * (3 * 2 * 2)  # forward and gradient of the weight: an image needs no gradient
    assert flops == patches + 3 * tokens * (6 * block + 12 * tokens * 32) + 6 * 32 * 10


def test_recomputed_chunks_are_not_model_work() -> None:
    whole, chunked = measure(on_meta(language()), TOKENS), measure(on_meta(language(loss_chunk_tokens=3)), TOKENS)
    assert chunked == whole
    assert counted_on_cpu(language(loss_chunk_tokens=3), TOKENS) > whole.flops_per_sample


@pytest.mark.parametrize(("make", "sample"), [(language, TOKENS), (vision, IMAGE)], ids=["gpt", "vit"])
def test_units_add_up(make: Any, sample: Any) -> None:
    module = on_meta(make())
    stats = measure(module, sample)
    assert [*stats.parameters_by_unit] == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert sum(stats.parameters_by_unit.values()) == stats.parameters
    assert stats.forward_flops_by_unit.keys() == stats.parameters_by_unit.keys()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.training_step(torch.utils._pytree.tree_map(lambda t: t.to("meta"), sample), 0)
    assert sum(stats.forward_flops_by_unit.values()) == counter.get_total_flops()


def test_a_tied_parameter_counts_once_and_for_its_first_unit() -> None:
    free, tied = (measure(on_meta(language(tie_embeddings=tie)), TOKENS) for tie in (False, True))
    assert free.parameters - tied.parameters == 61 * 32
    assert tied.parameters_by_unit["embed"] == 61 * 32
    assert tied.parameters_by_unit["head"] == 0


def test_parts_say_where_parameters_stand_and_what_passes() -> None:
    stats = measure(on_meta(language(tie_embeddings=True)), TOKENS)
    embed, block, head = (stats.units[name] for name in ("embed", "blocks.1", "head"))
    assert embed.parameters == head.parameters == (0,)
    assert [part.name.removeprefix("blocks.1.") for part in block.parts] == [
        "attention_norm", "attention.q", "attention.k", "attention.v", "attention.o",
        "mlp_norm", "mlp.gate", "mlp.up", "mlp.down",
    ]  # fmt: skip
    assert [part.style for part in block.parts[:5]] == ["sequence", "colwise", "colwise", "colwise", "rowwise"]
    assert embed.takes == Passed(other_bytes=8 * LENGTH, narrow=True)
    assert block.takes == block.gives == Passed(elements=LENGTH * 32)
    assert block.parts[2].gives == Passed(elements=LENGTH * 2 * 8, narrow=True)  # k: two heads
    assert head.parts[0].gives.elements == LENGTH * 61
    assert stats.between == ()


def test_autocast_leaves_narrow_what_is_narrow_here() -> None:
    """What stays in the format of products under autocast: the same in a real step."""
    module = on_meta(vision())
    parts = {part.name: part for unit in measure(module, IMAGE).units.values() for part in unit.parts}
    module.to_empty(device="cpu")
    formats: dict[str, torch.dtype] = {}
    for name in parts:
        module.get_submodule(f"net.{name}").register_forward_hook(
            lambda _, __, output, name=name: formats.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        module.training_step(IMAGE, 0)
    assert {name for name, part in parts.items() if part.gives.narrow} == {
        name for name, dtype in formats.items() if dtype == torch.bfloat16
    }


class Between(LightningModule):
    """One parameter in no unit of the net, one outside of the net."""

    plan = ParallelPlan(blocks=("first",), head=("second",))

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.outside = nn.Parameter(torch.zeros(3))
            self.net = nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 4)})
            self.net.scale = nn.Parameter(torch.ones(16))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.net["first"](batch) * self.net.scale
        return self.net["second"](x).square().mean() + self.outside.sum()


def test_parameters_outside_of_units_are_told_apart() -> None:
    stats = measure(Between(), torch.zeros(1, 8))
    assert [stats.shapes[position] for position in stats.between] == [(16,)]
    in_units = {position for unit in stats.units.values() for position in unit.parameters}
    assert {stats.shapes[position] for position in range(len(stats.shapes)) if position not in in_units} == {
        (3,),
        (16,),
    }


def test_measuring_leaves_no_trace() -> None:
    module = on_meta(language())
    measure(module, TOKENS)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Foreign(LightningModule):
    """A LightningModule of a user's: no plan, logs in its step, returns a dict, checkpoints activations."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        with torch.device("meta"):
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x = checkpoint(self.first, batch["x"].requires_grad_(), use_reentrant=self.use_reentrant)
        loss = self.second(x).square().mean()
        self.log("train/anything", loss)
        return {"loss": loss}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_any_lightning_module_can_be_measured(use_reentrant: bool) -> None:
    stats = measure(Foreign(use_reentrant), {"x": torch.zeros(1, 8)})
    assert stats.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert stats.flops_per_sample == 6 * (8 * 16 + 16 * 4)
    assert stats.parameters_by_unit == stats.forward_flops_by_unit == {}


@pytest.mark.full
def test_llama_70b_is_measured_without_allocating_it() -> None:
    shape = {"num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "mlp_size": 28672}
    before = peak_bytes()
    stats = measure(on_meta(language(vocab_size=128256, **shape)), torch.zeros(1, 4097, dtype=torch.long))
    assert stats.parameters == 70_553_706_496
    assert peak_bytes() - before < 2**28
