"""What a ViT's settings must be for there to be such a net. Imports no torch: it is asked before a run starts, too."""

from typing import Any

from models.nets.sizes import check_counts, check_heads, divisors
from models.refused import RefusedError


def check_vit(
    *,
    image_size: int,
    patch_size: int,
    num_channels: int,
    num_classes: int,
    num_layers: int,
    num_heads: int,
    hidden_size: int,
    mlp_size: int,
    **others: Any,
) -> None:
    """RefusedError for sizes that do not fit together."""
    check_counts(image_size=image_size, patch_size=patch_size, num_channels=num_channels, num_classes=num_classes)
    check_counts(num_layers=num_layers, mlp_size=mlp_size)
    check_heads(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_heads)
    if image_size % patch_size:
        raise RefusedError(
            f"model.net.patch_size={patch_size} does not divide model.net.image_size={image_size}; "
            f"choose one of {divisors(image_size)}."
        )


CHECKS = {"ViT": check_vit}
