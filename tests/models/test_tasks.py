"""LanguageModel and ImageClassifier as ordinary LightningModules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from models.language import LanguageModel
from models.nets.gpt import GPT
from models.nets.vit import ViT
from models.optimize import decay_groups
from models.schedules import constant
from models.vision import ImageClassifier

MAKE_GPT = partial(GPT, vocab_size=61, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, mlp_size=48)
MAKE_VIT = partial(
    ViT, image_size=8, patch_size=4, num_channels=1, num_classes=10, num_layers=2, num_heads=4,
    hidden_size=32, mlp_size=48,
)  # fmt: skip
PARTS: dict[str, Any] = {
    "optimizer": partial(AdamW, lr=0.01, weight_decay=0.1), "scheduler": partial(constant, warmup_steps=2)
}  # fmt: skip


def built(module: LightningModule) -> LightningModule:
    """The module with weights, as a strategy would make them."""
    module.configure_model()
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for part in module.modules():
        if list(part.parameters(recurse=False)):
            part.reset_parameters()  # type: ignore[operator]
    return module


def batches() -> dict[type[LightningModule], list[Any]]:
    """Two batches of 4 and one of 2 samples for each kind of model."""
    torch.manual_seed(1)
    sizes = (4, 4, 2)
    return {
        LanguageModel: [torch.randint(61, (size, 17)) for size in sizes],
        ImageClassifier: [(torch.rand(size, 1, 8, 8), torch.randint(10, (size,))) for size in sizes],
    }


TASKS = pytest.mark.parametrize(
    ("task", "make_net"), [(LanguageModel, MAKE_GPT), (ImageClassifier, MAKE_VIT)], ids=["language", "vision"]
)


@TASKS
def test_the_net_is_built_on_meta_once(task: Callable[..., Any], make_net: Callable[[], nn.Module]) -> None:
    module = task(net=make_net, **PARTS)
    module.configure_model()
    net = module.net
    module.configure_model()
    assert module.net is net
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not list(module.buffers())
    assert module.plan.blocks == ("blocks.*",)


@TASKS
def test_a_module_initialises_its_parameters_wholly_and_by_itself(
    task: Callable[..., Any], make_net: Callable[[], nn.Module]
) -> None:
    whole = make_net()
    for name, part in whole.named_modules():
        owned = dict(part.named_parameters(recurse=False))
        for parameter in owned.values():
            nn.init.constant_(parameter, float("nan"))
        if owned:
            torch.manual_seed(3)
            part.reset_parameters()
            alone = make_net().get_submodule(name)
            torch.manual_seed(3)
            alone.reset_parameters()  # type: ignore[operator]
            for key, parameter in owned.items():
                assert torch.equal(parameter, alone.get_parameter(key)), f"{name}.{key}"


def test_projections_into_the_stream_start_smaller() -> None:
    torch.manual_seed(0)
    net = GPT(vocab_size=512, num_layers=8, num_heads=4, hidden_size=128, mlp_size=512, bias=True)
    stds = {name: parameter.std().item() for name, parameter in net.named_parameters()}
    assert stds["embed.tokens.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["head.logits.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["blocks.3.attention.q.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["blocks.3.mlp.up.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["blocks.3.attention.o.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert stds["blocks.3.mlp.down.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert stds["blocks.3.mlp.down.bias"] == 0


def test_a_language_model_predicts_the_next_token() -> None:
    module, batch = built(LanguageModel(net=MAKE_GPT, **PARTS)), batches()[LanguageModel][0]
    logits = module.net(batch[:, :-1])  # type: ignore[operator]
    expected = sum(cross_entropy(logits[:, t], batch[:, t + 1]) for t in range(16)) / 16
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_a_prompt_is_no_target(chunk_tokens: int | None) -> None:
    make_net = partial(MAKE_GPT, loss_chunk_tokens=chunk_tokens)
    module, batch = built(LanguageModel(net=make_net, prompt_end=60, **PARTS)), batches()[LanguageModel][0]
    batch = batch.clamp(max=59)
    batch[0, 3] = batch[1, 0] = batch[1, 9] = 60  # the others have no target at all
    logits: Any = module.net(batch[:, :-1])  # type: ignore[operator]
    counted = [*((0, t) for t in range(3, 16)), *((1, t) for t in range(16))]
    expected = sum(cross_entropy(logits[i, t], batch[i, t + 1]) for i, t in counted) / len(counted)
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    without: Any = module.training_step(batch[2:], 0)
    assert without.item() == 0


@pytest.mark.parametrize("value", [-1, "a"])
def test_a_prompts_end_that_is_no_token_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"model.prompt_end={value} is no token's id"):
        LanguageModel(net=MAKE_GPT, prompt_end=value, **PARTS)


@TASKS
def test_a_net_learns_one_batch_by_heart(task: type[LightningModule], make_net: Callable[[], nn.Module]) -> None:
    module, batch = built(task(net=make_net, **PARTS)), batches()[task][0]
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    losses = []
    for _ in range(60):
        loss: Any = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(61.0 if task is LanguageModel else 10.0).log().item(), abs=0.1)
    assert losses[-1] < 0.2


@TASKS
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")
def test_validation_weighs_a_ragged_batch_by_its_samples(
    task: type[LightningModule], make_net: Callable[[], nn.Module]
) -> None:
    module, data = built(task(net=make_net, **PARTS)), batches()[task]
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    (seen,) = trainer.validate(module, DataLoader(data, batch_size=None), verbose=False)  # type: ignore[arg-type]
    losses = [module.training_step(batch, 0).item() for batch in data]  # type: ignore[union-attr]
    assert seen["val/loss"] == pytest.approx((4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10, abs=1e-6)
    assert ("val/accuracy" in seen) == (task is ImageClassifier)


def test_matrices_decay_and_vectors_do_not() -> None:
    net = MAKE_GPT(bias=True, positions="learned", max_sequence_length=16, norm="layer")
    decayed, spared = decay_groups(net.parameters())
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in spared["params"]} == {1}
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))


def test_what_a_rank_does_not_own_or_train_is_left_out() -> None:
    net = MAKE_GPT()
    (group,) = decay_groups(net.embed.parameters())  # a stage without vectors
    assert len(group["params"]) == 1
    net.requires_grad_(False).norm.requires_grad_(True)
    (group,) = decay_groups(net.parameters())
    assert group["params"] == [net.norm.weight]


def test_the_schedule_moves_every_optimizer_step_and_may_be_left_out() -> None:
    module = built(LanguageModel(net=MAKE_GPT, **PARTS))
    configured: Any = module.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    assert configured["optimizer"].param_groups[0]["lr"] == pytest.approx(0.005)
    bare = built(LanguageModel(net=MAKE_GPT, optimizer=partial(SGD, lr=0.1), scheduler=None))
    assert isinstance(bare.configure_optimizers(), SGD)
