"""Transformer layers that every net here is made of; each one initialises itself, needing nothing else.

A module that owns a parameter has `reset_parameters()`, so that any part of a net built on the meta device can be
given its weights alone. Head counts are read off the tensors, so that a layer computes correctly on a shard of its
heads or of its hidden units. Nothing casts a double down.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu


class Linear(nn.Linear):
    """Linear map with weights from N(0, std) and a bias of zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float) -> None:
        self.std = std  # before super().__init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # there is nothing to draw yet, and torch takes milliseconds over it, in Python
            return
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Lookup table with rows from N(0, std)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        self.std = std  # before super().__init__, which calls reset_parameters
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.std)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What all layers on one residual stream share; `out_std` is for the projections back into it."""

    hidden_size: int
    bias: bool
    std: float
    out_std: float

    def into(self, size: int) -> Linear:
        """Projection out of the stream, hidden -> size."""
        return Linear(self.hidden_size, size, bias=self.bias, std=self.std)

    def back(self, size: int) -> Linear:
        """Projection back into the stream, size -> hidden."""
        return Linear(size, self.hidden_size, bias=self.bias, std=self.out_std)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023), [batch, time, hidden] -> the same shape.

    `rope_theta` is the base of rotary positions (Su et al. 2021, section 3.2.2), None for none.
    """

    def __init__(
        self, stream: Stream, *, num_heads: int, num_kv_heads: int, causal: bool, rope_theta: float | None
    ) -> None:
        super().__init__()
        self.head_dim = stream.hidden_size // num_heads
        self.causal = causal
        self.rope_theta = rope_theta
        self.q = stream.into(num_heads * self.head_dim)
        self.k = stream.into(num_kv_heads * self.head_dim)
        self.v = stream.into(num_kv_heads * self.head_dim)
        self.o = stream.back(num_heads * self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(project(x)) for project in (self.q, self.k, self.v))
        if self.rope_theta is not None:
            cos, sin = rotary_tables(q, self.rope_theta)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o(attend(q, k, v, causal=self.causal).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[batch, time, heads * head_dim] -> [batch, heads, time, head_dim], for as many heads as there are."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attention of q [batch, heads, time, head_dim] on k, v with as many heads or a divisor of them."""
    group = q.shape[1] // k.shape[1]
    # On CUDA only the flash kernel shares k and v among query heads (torch's documentation of enable_gqa), and it takes
    # no wider dtype than bfloat16; all scores would be written out instead. On CPU sharing takes 0.88 x the time of
    # repeating (6 heads on 2, head_dim 64, 4 x 256 tokens, fp32, forward and backward, 1 thread, torch 2.13).
    if group > 1 and q.is_cuda and q.dtype.itemsize > 2:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)


def rotary_tables(q: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [time, head_dim / 2] in q's dtype for q [..., time, head_dim].

    Angles are taken in float32 at least: in bfloat16 position 257 is position 256.
    """
    length, half = q.shape[-2], q.shape[-1] // 2
    dtype = torch.promote_types(q.dtype, torch.float32)
    frequencies = theta ** (torch.arange(half, dtype=dtype, device=q.device) / -half)
    angles = torch.arange(length, dtype=dtype, device=q.device)[:, None] * frequencies
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (i, i + head_dim / 2) of x [..., time, head_dim] by its angle, as Llama's weights on Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class SwiGLU(nn.Module):
    """Gated MLP down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, stream: Stream, *, mlp_size: int) -> None:
        super().__init__()
        self.gate = stream.into(mlp_size)
        self.up = stream.into(mlp_size)
        self.down = stream.back(mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class GELU(nn.Module):
    """MLP down(gelu(up(x))); `approximate` is "tanh" as in GPT-2 or "none" for the exact function as in ViT."""

    def __init__(self, stream: Stream, *, mlp_size: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.up = stream.into(mlp_size)
        self.down = stream.back(mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm residual block, [batch, time, hidden] -> the same shape; its four parts are given to it."""

    def __init__(self, *, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


# The plan's tensor styles of a net whose `blocks` are Blocks; SwiGLU's gate is for its net to add.
BLOCK_STYLES = {
    "blocks.*.attention_norm": "sequence",
    "blocks.*.attention.[qkv]": "colwise",
    "blocks.*.attention.o": "rowwise",
    "blocks.*.mlp_norm": "sequence",
    "blocks.*.mlp.up": "colwise",
    "blocks.*.mlp.down": "rowwise",
}
