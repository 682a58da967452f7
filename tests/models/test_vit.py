"""ViT computes what it says it computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.nets.vit import ViT

SHAPE: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "num_channels": 1, "num_classes": 10, "num_layers": 2, "num_heads": 4,
    "hidden_size": 32, "mlp_size": 48,
}  # fmt: skip


def make(**changes: Any) -> ViT:
    """A double-precision net whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    return ViT(**(SHAPE | {"init_std": 0.3} | changes)).double()


def images(batch_size: int = 3) -> Tensor:
    return torch.rand(batch_size, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_chain_of_the_plan_is_the_forward() -> None:
    net, x = make(), images()
    expected = net(x)
    for name in net.plan.expand(name for name, _ in net.named_modules()).modules:
        x = net.get_submodule(name)(x)
    assert torch.equal(x, expected)
    assert x.shape == (3, 10)


@pytest.mark.parametrize("corner", [(0, 0), (0, 7), (7, 0), (7, 7)])
def test_every_patch_reaches_the_logits(corner: tuple[int, int]) -> None:
    changed = images()
    changed[0, 0, corner[0], corner[1]] += 1
    difference = (make()(images()) - make()(changed)).abs()
    assert difference[0].min() > 1e-4
    assert difference[1:].max() < 1e-12


def test_where_a_patch_lies_matters() -> None:
    assert (make()(images()) - make()(images().roll(4, dims=2))).abs().max() > 1e-4


def test_a_double_stays_double_and_samples_do_not_mix() -> None:
    logits = make()(images())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(make()(images().flip(0)).flip(0), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch_size": 3},
            r"model\.net\.patch_size=3 does not divide model\.net\.image_size=8; choose one of 1, 2, 4, 8",
        ),
        ({"num_heads": 5}, r"model\.net\.num_heads=5 does not divide model\.net\.hidden_size=32; .*"),
        ({"num_classes": 0}, r"model\.net\.num_classes=0 is no size; .*"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}\\.$"):
        make(**changes)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.net\.image_size=8 does not fit images of 12 x 8; "):
        make()(torch.zeros(1, 1, 12, 8, dtype=torch.float64))
