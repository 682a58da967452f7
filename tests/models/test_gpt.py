"""GPT computes what it says it computes, in every shape, in chunks and on shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from models.nets.gpt import GPT
from models.nets.layers import Attention, Stream, rotary_tables, rotate

LLAMA: dict[str, Any] = {
    "vocab_size": 61, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "mlp_size": 48
}  # fmt: skip
GPT2: dict[str, Any] = LLAMA | {
    "num_kv_heads": 4, "norm": "layer", "mlp": "gelu", "positions": "learned", "max_sequence_length": 16, "bias": True,
    "tie_embeddings": True,
}  # fmt: skip
SHAPES = pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])


@contextmanager
def seen_dtypes() -> Iterator[set[torch.dtype]]:
    """Yield the dtypes of every floating tensor that any operation returns."""
    seen: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple) else (result,)
            seen.update(t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
            return result

    with Watch():
        yield seen


def make(shape: dict[str, Any], **changes: Any) -> GPT:
    """A double-precision net whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    return GPT(**(shape | {"init_std": 0.3} | changes)).double()


def batch(batch_size: int = 3, length: int = 16) -> Tensor:
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(1))


@SHAPES
def test_a_later_token_does_not_change_earlier_logits(shape: dict[str, Any]) -> None:
    net, tokens = make(shape), batch()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-4  # and every later one sees it


@SHAPES
def test_the_order_of_tokens_matters(shape: dict[str, Any]) -> None:
    net, tokens = make(shape), batch()
    swapped = tokens.clone()
    swapped[:, [2, 5]] = tokens[:, [5, 2]]
    assert (net(tokens)[:, -1] - net(swapped)[:, -1]).abs().max() > 1e-4


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 9, 8, dtype=torch.float64)[:, :1].expand(-1, 9, -1).unbind()
    cos, sin = rotary_tables(q, 100.0)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0].diff().abs().min() > 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_formula(causal: bool) -> None:
    torch.manual_seed(0)
    stream = Stream(hidden_size=32, bias=True, std=0.3, out_std=0.3)
    attention = Attention(stream, num_heads=4, num_kv_heads=4, causal=causal, rope_theta=50.0).double()
    x = torch.randn(7, 32, dtype=torch.float64)
    angles = torch.arange(7)[:, None] * 50.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)  # a pair of dims as one complex number
    heads = []
    for q, k, v in zip(
        *(project(x).split(8, dim=-1) for project in (attention.q, attention.k, attention.v)), strict=True
    ):
        turned_q, turned_k = (torch.complex(*y.chunk(2, dim=-1)) * turn for y in (q, k))
        scores = (turned_q @ turned_k.mH).real / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(x[None])[0], attention.o(torch.cat(heads, dim=-1)), rtol=0, atol=1e-12)


def test_grouped_queries_equal_full_heads_with_repeated_weights() -> None:
    grouped, full = make(LLAMA), make(LLAMA, num_kv_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            state[name] = weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(batch()), full(batch()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", [None, 50.0], ids=["no positions", "rotary"])
def test_shards_of_heads_sum_to_the_whole(positions: float | None) -> None:
    stream = Stream(hidden_size=32, bias=False, std=0.3, out_std=0.3)
    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "causal": True, "rope_theta": positions}
    whole = Attention(stream, **sizes).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    total = torch.zeros_like(x)
    for shard in range(2):
        part = Attention(stream, **sizes).double()
        for name, linear in part.named_children():
            full = whole.get_parameter(f"{name}.weight")
            linear.weight = torch.nn.Parameter(full.chunk(2, dim=1 if name == "o" else 0)[shard])
        total = total + part(x)
    torch.testing.assert_close(total, whole(x), rtol=0, atol=1e-12)


@SHAPES
@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 47])
def test_the_loss_in_chunks_equals_the_loss_at_once(shape: dict[str, Any], chunk_tokens: int) -> None:
    tokens, targets = batch(), batch().flip(1)
    chunked, whole = make(shape, loss_chunk_tokens=chunk_tokens), make(shape)
    losses = chunked(tokens, targets=targets), whole(tokens, targets=targets)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses[1], cross_entropy(whole(tokens).flatten(0, 1), targets.flatten()))
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12, msg=name)


def test_a_chunk_holds_at_most_so_many_tokens() -> None:
    net, sizes = make(LLAMA, loss_chunk_tokens=10), []
    net.head.logits.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    net(batch(), targets=batch())
    assert sum(sizes) == 48
    assert max(sizes) <= 10


def test_large_logits_are_chunked_by_themselves() -> None:
    with torch.device("meta"):
        net, calls = GPT(**(LLAMA | {"vocab_size": 2**16})), []
        net.head.logits.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
        tokens = torch.zeros(4, 256, dtype=torch.long)
    net(tokens[:2], targets=tokens[:2])
    assert calls == [512]
    net(tokens, targets=tokens)
    assert calls == [512, 512, 512]


@SHAPES
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_double_stays_double(shape: dict[str, Any], chunk_tokens: int | None) -> None:
    net = make(shape, loss_chunk_tokens=chunk_tokens)
    with seen_dtypes() as seen:
        net(batch(), targets=batch()).backward()
    assert seen == {torch.float64}


def test_the_loss_of_a_bfloat16_net_is_float32() -> None:
    net = make(LLAMA).bfloat16()
    assert net(batch(), targets=batch()).dtype == torch.float32
    assert net(batch()).dtype == torch.bfloat16


@SHAPES
def test_the_chain_of_the_plan_is_the_forward(shape: dict[str, Any]) -> None:
    net, tokens, targets = make(shape), batch(), batch().flip(1)
    *first, last = net.plan.expand(name for name, _ in net.named_modules()).modules
    x = tokens
    for name in first:
        x = net.get_submodule(name)(x)
    assert torch.equal(net.get_submodule(last)(x), net(tokens))
    assert torch.equal(net.get_submodule(last)(x, targets=targets), net(tokens, targets=targets))


def test_tied_embeddings_are_one_parameter_with_its_owner_first() -> None:
    net = make(GPT2)
    ((owner, other),) = net.plan.tied
    assert net.get_parameter(owner) is net.get_parameter(other)
    assert owner in dict(net.named_parameters())
    assert make(LLAMA).plan.tied == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 5},
            r"model\.net\.num_heads=5 does not divide model\.net\.hidden_size=32; choose one of 1, 2, .*32",
        ),
        ({"num_kv_heads": 3}, r"model\.net\.num_kv_heads=3 does not divide model\.net\.num_heads=4; .* 1, 2, 4"),
        ({"num_heads": 32, "num_kv_heads": 32}, r"model\.net\.positions=rotary cannot pair up the 1 dims .*learned"),
        ({"num_layers": -1}, r"model\.net\.num_layers=-1 is no size; give a positive integer"),
        ({"num_kv_heads": 0}, r"model\.net\.num_kv_heads=0 is no size; .*"),
        ({"hidden_size": 32.0}, r"model\.net\.hidden_size=32\.0 is no size; .*"),
        ({"loss_chunk_tokens": 0}, r"model\.net\.loss_chunk_tokens=0 is no size; .*"),
        ({"norm": "batch"}, r"model\.net\.norm=batch is unknown; choose rms or layer"),
        ({"positions": "learned"}, r"model\.net\.positions=learned has no table size; .*max_sequence_length.*"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}\\.$"):
        GPT(**(LLAMA | changes))


def test_a_sequence_longer_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.sequence_length=17 exceeds model\.net\.max_sequence_length=16; "):
        make(GPT2)(batch(length=17))
