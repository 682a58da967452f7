"""What a GPT's settings must be for there to be such a net. Imports no torch: it is asked before a run starts, too."""

from typing import Any

from models.nets.sizes import check_choice, check_counts, check_heads
from models.refused import RefusedError


def check_gpt(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    hidden_size: int,
    mlp_size: int,
    num_kv_heads: int | None = None,
    norm: str = "rms",
    mlp: str = "swiglu",
    positions: str = "rotary",
    max_sequence_length: int | None = None,
    loss_chunk_tokens: int | None = None,
    **others: Any,
) -> None:
    """RefusedError for sizes that do not fit together, and for words that mean nothing."""
    check_counts(vocab_size=vocab_size, num_layers=num_layers, mlp_size=mlp_size)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_heads(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check_choice("norm", norm, ("rms", "layer"))
    check_choice("mlp", mlp, ("swiglu", "gelu"))
    check_positions(positions, max_sequence_length, head_dim=hidden_size // num_heads)
    if loss_chunk_tokens is not None:
        check_counts(loss_chunk_tokens=loss_chunk_tokens)


def check_positions(positions: str, max_sequence_length: int | None, *, head_dim: int) -> None:
    check_choice("positions", positions, ("rotary", "learned"))
    if positions == "learned":
        if max_sequence_length is None:
            raise RefusedError(
                "model.net.positions=learned has no table size; give model.net.max_sequence_length=1024 or so."
            )
        check_counts(max_sequence_length=max_sequence_length)
    elif head_dim % 2:
        raise RefusedError(
            f"model.net.positions=rotary cannot pair up the {head_dim} dims of a head; choose a model.net.num_heads "
            "that leaves an even number, or positions=learned."
        )


CHECKS = {"GPT": check_gpt}
