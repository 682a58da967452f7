"""GPT: a decoder-only transformer that can be said in Llama's shape or in GPT-2's."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from models.nets.gpt_settings import check_gpt
from models.nets.layers import (
    BLOCK_STYLES,
    GELU,
    Attention,
    Block,
    Embedding,
    Linear,
    Stream,
    SwiGLU,
)
from models.plan import ParallelPlan
from models.refused import RefusedError

# Above this many logits (128 MiB in float32) the head works in chunks of at most as many. Head and loss alone, forward
# and backward, 4096 tokens, fp32, 1 thread of a shared 2-core machine, torch 2.13, s and peak MiB over the start:
#   vocabulary x hidden    whole         2**25        2**24        2**22         2**20
#   256 x 384              0.03, 39      one chunk    one chunk    one chunk     one chunk
#   8192 x 384             1.0, 449      one chunk    1.4, 347     1.1, 415      1.4, 440
#   50257 x 384            7.3, 2381     10.1, 520    10.3, 351    13.4, 1048    24.7, 815
#   50257 x 768            11.9, 2387    15.4, 603    16.2, 546    21.1, 1221    48.2, 961
# Times scatter by a third, MiB by 3 %. Computing logits again should cost 4/3; the smaller the chunks, the more often
# a full-size gradient of the weight is added up.
LOGITS_AT_ONCE = 2**25

NORM_EPS = 1e-5  # GPT-2 and Llama 3 alike
IGNORED = -100  # a target that does not count: torch's own number for it


class TokenEmbedding(nn.Module):
    """Token ids [batch, time] -> [batch, time, hidden], with learned positions if `max_sequence_length` is given."""

    def __init__(self, *, vocab_size: int, hidden_size: int, max_sequence_length: int | None, std: float) -> None:
        super().__init__()
        self.tokens = Embedding(vocab_size, hidden_size, std=std)
        self.positions = Embedding(max_sequence_length, hidden_size, std=std) if max_sequence_length else None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.positions is None:
            return self.tokens(tokens)
        length, limit = tokens.shape[1], self.positions.num_embeddings
        if length > limit:
            raise RefusedError(
                f"data.sequence_length={length} exceeds model.net.max_sequence_length={limit}; "
                "shorten the one or raise the other."
            )
        return self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))


class LanguageHead(nn.Module):
    """Hidden states to logits, or straight to the loss without ever holding all logits."""

    def __init__(
        self, *, hidden_size: int, vocab_size: int, std: float, loss_chunk_tokens: int | None, ignores_targets: bool
    ) -> None:
        super().__init__()
        self.logits = Linear(hidden_size, vocab_size, bias=False, std=std)
        self.chunk_tokens = loss_chunk_tokens or max(1, LOGITS_AT_ONCE // vocab_size)
        self.ignores_targets = ignores_targets

    def forward(self, x: Tensor, *, targets: Tensor | None = None) -> Tensor:
        """[batch, time, hidden] -> logits [batch, time, vocab], or the mean loss over the targets [batch, time]."""
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        num_targets: Tensor | int = (targets != IGNORED).sum().clamp(min=1) if self.ignores_targets else len(targets)
        num_chunks = math.ceil(len(targets) / self.chunk_tokens)
        if num_chunks == 1:
            return self._summed_loss(x, targets) / num_targets
        # Each chunk's logits are computed again in backward instead of kept. Nothing here is random: no RNG to restore.
        losses = [
            checkpoint(self._summed_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(x.chunk(num_chunks), targets.chunk(num_chunks), strict=True)
        ]
        return torch.stack(losses).sum() / num_targets

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over the tokens, in float32 or wider: bfloat16 sums lose whole tokens."""
        logits = self.logits(x)
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


class GPT(nn.Module):
    """Pre-norm decoder. `forward(tokens)` gives logits, `forward(tokens, targets=targets)` the mean cross-entropy.

    tokens and targets are int64 [batch, time], logits [batch, time, vocab]; the loss is a scalar in nats, every target
    counting alike, or each that is not IGNORED if `ignores_targets`. With `targets` the head works in chunks of
    `loss_chunk_tokens` tokens; None chooses by the size of the logits, and a number of at least a micro-batch's tokens
    turns chunks off.

    Initial weights are N(0, init_std), those of the projections into the residual stream N(0, init_std / sqrt(2 *
    num_layers)) (Radford et al. 2019, section 2.3), biases 0, norms 1. ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int,
        num_heads: int,
        hidden_size: int,
        mlp_size: int,
        num_kv_heads: int | None = None,
        norm: Literal["rms", "layer"] = "rms",
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        positions: Literal["rotary", "learned"] = "rotary",
        max_sequence_length: int | None = None,
        rope_theta: float = 10_000.0,
        tie_embeddings: bool = False,
        bias: bool = False,
        init_std: float = 0.02,
        loss_chunk_tokens: int | None = None,
        ignores_targets: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_gpt(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_size=hidden_size,
            mlp_size=mlp_size,
            num_kv_heads=num_kv_heads,
            norm=norm,
            mlp=mlp,
            positions=positions,
            max_sequence_length=max_sequence_length,
            loss_chunk_tokens=loss_chunk_tokens,
        )
        learned = positions == "learned"
        stream = Stream(hidden_size=hidden_size, bias=bias, std=init_std, out_std=init_std / math.sqrt(2 * num_layers))

        def make_norm() -> nn.Module:
            return (
                nn.RMSNorm(hidden_size, NORM_EPS) if norm == "rms" else nn.LayerNorm(hidden_size, NORM_EPS, bias=bias)
            )

        def make_block() -> Block:
            return Block(
                attention_norm=make_norm(),
                attention=Attention(
                    stream,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    causal=True,
                    rope_theta=None if learned else rope_theta,
                ),
                mlp_norm=make_norm(),
                mlp=_make_mlp(mlp, stream, mlp_size),
            )

        self.embed = TokenEmbedding(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            max_sequence_length=max_sequence_length if learned else None,
            std=init_std,
        )
        self.blocks = nn.ModuleList(make_block() for _ in range(num_layers))
        self.norm = make_norm()
        self.head = LanguageHead(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            std=init_std,
            loss_chunk_tokens=loss_chunk_tokens,
            ignores_targets=ignores_targets,
        )
        if tie_embeddings:
            self.head.logits.weight = self.embed.tokens.weight
        gate = {"blocks.*.mlp.gate": "colwise"} if mlp == "swiglu" else {}
        self.plan = ParallelPlan(
            stem=("embed",),
            blocks=("blocks.*",),
            head=("norm", "head"),
            tensor=BLOCK_STYLES | gate | {"embed.tokens": "embedding", "norm": "sequence", "head.logits": "vocabulary"},
            splits={
                "model.net.vocab_size": vocab_size,
                "model.net.num_heads": num_heads,
                "model.net.num_kv_heads": num_kv_heads,
                "model.net.mlp_size": mlp_size,
            },
            tied=(("embed.tokens.weight", "head.logits.weight"),) if tie_embeddings else (),
        )

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x), targets=targets)


def _make_mlp(kind: str, stream: Stream, mlp_size: int) -> nn.Module:
    if kind == "swiglu":
        return SwiGLU(stream, mlp_size=mlp_size)
    return GELU(stream, mlp_size=mlp_size, approximate="tanh")
