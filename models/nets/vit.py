"""ViT: the vision transformer of Dosovitskiy et al. 2020, for square images of any size."""

import math

import torch
from torch import Tensor, nn

from models.nets.layers import BLOCK_STYLES, GELU, Attention, Block, Linear, Stream
from models.nets.vit_settings import check_vit
from models.plan import ParallelPlan
from models.refused import RefusedError

NORM_EPS = 1e-6  # the paper's published code (google-research/vision_transformer), not its text


class Patches(nn.Conv2d):
    """Images [batch, channel, height, width] -> [batch, patch, hidden]; weights from N(0, std), a bias of zero."""

    def __init__(self, *, num_channels: int, hidden_size: int, patch_size: int, std: float) -> None:
        self.std = std  # before super().__init__, which calls reset_parameters
        super().__init__(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


class ImageEmbedding(nn.Module):
    """Images -> [batch, 1 + patch, hidden]: a class token, then the patches, each at its learned position."""

    def __init__(self, *, image_size: int, num_channels: int, hidden_size: int, patch_size: int, std: float) -> None:
        super().__init__()
        self.image_size = image_size
        self.std = std
        self.patches = Patches(num_channels=num_channels, hidden_size=hidden_size, patch_size=patch_size, std=std)
        self.class_token = nn.Parameter(torch.empty(hidden_size))
        self.positions = nn.Parameter(torch.empty(1 + (image_size // patch_size) ** 2, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.class_token, std=self.std)
        nn.init.normal_(self.positions, std=self.std)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.image_size, self.image_size):
            raise RefusedError(
                f"model.net.image_size={self.image_size} does not fit images of {images.shape[2]} x {images.shape[3]}; "
                "give the size that the data has."
            )
        class_token = self.class_token.expand(len(images), 1, -1)
        return torch.cat((class_token, self.patches(images)), dim=1) + self.positions


class ClassHead(nn.Module):
    """[batch, 1 + patch, hidden] -> logits [batch, class], read off the class token."""

    def __init__(self, *, hidden_size: int, num_classes: int, std: float) -> None:
        super().__init__()
        self.logits = Linear(hidden_size, num_classes, bias=True, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x[:, 0])


class ViT(nn.Module):
    """Pre-norm encoder with GELU and biases; images [batch, channel, size, size] -> logits [batch, class].

    Initial weights as in models.nets.gpt.GPT. ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_channels: int,
        num_classes: int,
        num_layers: int,
        num_heads: int,
        hidden_size: int,
        mlp_size: int,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_vit(
            image_size=image_size,
            patch_size=patch_size,
            num_channels=num_channels,
            num_classes=num_classes,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_size=hidden_size,
            mlp_size=mlp_size,
        )
        stream = Stream(hidden_size=hidden_size, bias=True, std=init_std, out_std=init_std / math.sqrt(2 * num_layers))

        def make_block() -> Block:
            return Block(
                attention_norm=nn.LayerNorm(hidden_size, NORM_EPS),
                attention=Attention(stream, num_heads=num_heads, num_kv_heads=num_heads, causal=False, rope_theta=None),
                mlp_norm=nn.LayerNorm(hidden_size, NORM_EPS),
                mlp=GELU(stream, mlp_size=mlp_size, approximate="none"),
            )

        self.embed = ImageEmbedding(
            image_size=image_size,
            num_channels=num_channels,
            hidden_size=hidden_size,
            patch_size=patch_size,
            std=init_std,
        )
        self.blocks = nn.ModuleList(make_block() for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, NORM_EPS)
        self.head = ClassHead(hidden_size=hidden_size, num_classes=num_classes, std=init_std)
        # Under tensor parallelism the embedding and the head stay whole: they are small. So does the sequence: with the
        # class token its length is odd.
        whole = {"blocks.*.attention_norm": "whole", "blocks.*.mlp_norm": "whole"}
        self.plan = ParallelPlan(
            stem=("embed",),
            blocks=("blocks.*",),
            head=("norm", "head"),
            tensor=BLOCK_STYLES | whole,
            splits={"model.net.num_heads": num_heads, "model.net.mlp_size": mlp_size},
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
