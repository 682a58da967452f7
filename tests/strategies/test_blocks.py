"""Blocks that run forward again in backward, and blocks that are compiled: what is kept, run and left as it was."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.job import Job, resolve
from launch.schema import ConfigError, validate
from strategies.engines import blocks
from strategies.engines.blocks import Again, compile_blocks, rework
from tests.composing import compose_fast
from tests.strategies.own_models import Block


class Noisy(nn.Module):
    """Draws random numbers, and makes a tensor in the default format."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = Block(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.inner(x)) * torch.full((), 1.1).exp()


def chain(kind: type[nn.Module], number: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(kind(*sizes) for _ in range(number)))


def saved_bytes(mode: str) -> int:
    """Bytes that 4 blocks keep for backward besides their weights, each storage once."""
    net = chain(Block, 4, 8)
    rework(list(net), compiled=False, checkpointing=mode)
    weights = {parameter.data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(torch.ones(16, 8))
    assert output.requires_grad  # and keeps alive what was counted
    return sum(size for address, size in kept.items() if address not in weights)


def test_checkpointed_blocks_keep_their_inputs_alone() -> None:
    one_input = 16 * 8 * 4
    assert saved_bytes("full") == saved_bytes("every_1") == 4 * one_input
    assert saved_bytes("full") < saved_bytes("every_2") < saved_bytes("every_4") < saved_bytes("none")


@pytest.mark.parametrize(
    ("mode", "runs"),
    [("none", [1, 1, 1, 1]), ("full", [2, 2, 2, 2]), ("every_2", [2, 1, 2, 1]), ("every_3", [2, 1, 1, 2])],
)
def test_forward_runs_twice_where_a_block_is_checkpointed(mode: str, runs: list[int]) -> None:
    net, counted = chain(Block, 4, 8), [0] * 4

    def count(index: int, *_: Any) -> None:
        counted[index] += 1

    for index, block in enumerate(net):
        assert isinstance(block, Block)
        block.up.register_forward_pre_hook(partial(count, index))
    rework(list(net), compiled=False, checkpointing=mode)
    net(torch.ones(16, 8)).sum().backward()
    assert counted == runs


AROUND: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "float64": partial(Again, nn.Identity(), torch.float64),
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("around", AROUND)
def test_gradients_are_the_same_bits(around: str) -> None:
    """With dropout, under autocast, and with the default format that Lightning sets around the training step alone."""
    gradients = []
    for mode in ("none", "full"):
        net = chain(Noisy, 3)
        rework(list(net), compiled=False, checkpointing=mode)
        with AROUND[around]():
            loss = net(torch.ones(16, 8, dtype=torch.float32)).sum()
        torch.rand(7)  # backward finds another state of the generator
        loss.backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_statistics_are_taken_once() -> None:
    found = []
    for mode in ("none", "full"):
        net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
        nn.init.eye_(net[0][0].weight)  # type: ignore[index]
        nn.init.zeros_(net[0][0].bias)  # type: ignore[index]
        rework(list(net), compiled=False, checkpointing=mode)
        net(torch.arange(32.0).view(4, 8)).square().sum().backward()
        found.append(list(net.buffers()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert found[0][2] == 1


def test_evaluation_just_runs_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr(blocks, "checkpoint", refuse)
    net, x = chain(Block, 2, 8), torch.ones(16, 8)
    rework(list(net), compiled=False, checkpointing="full")
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    net.eval()(x)
    with pytest.raises(AssertionError, match="checkpointed"):
        net.train()(x)


# Dynamo asks every tensor that it meets for its gradient.
GRAD_ASKED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What torch.compile does, as it happens, without a compiler: "graph" where one is made, "run" where it is used."""
    events: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        events.append("graph")

        def run(*args: Any) -> Any:
            events.append("run")
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield events
    torch.compiler.reset()


@GRAD_ASKED
@pytest.mark.parametrize("number", [2, pytest.param(12, marks=pytest.mark.full)])
def test_equal_blocks_are_compiled_once(number: int, compiled: list[str]) -> None:
    net = chain(Block, number, 8)
    compile_blocks(list(net))
    net(torch.ones(16, 8, requires_grad=True)).sum().backward()
    assert compiled == ["graph", *["run"] * number]


@GRAD_ASKED
def test_checkpoint_runs_what_is_compiled(compiled: list[str]) -> None:
    net = chain(Block, 2, 8)
    rework(list(net), compiled=True, checkpointing="full")
    net(torch.ones(16, 8, requires_grad=True)).sum().backward()
    assert compiled == ["graph", "run", "run", "run", "run"]


@GRAD_ASKED
@pytest.mark.parametrize("compiling", [False, True])
def test_names_and_hooks_stay(compiling: bool, compiled: list[str]) -> None:
    net, seen = chain(Block, 2, 8), list[str]()
    names = [name for name, _ in net.named_modules()], list(net.state_dict())
    net[0].register_forward_hook(lambda *_: seen.append("before"))
    rework(list(net), compiled=compiling, checkpointing="full")
    net[0].register_forward_hook(lambda *_: seen.append("after"))
    assert ([name for name, _ in net.named_modules()], list(net.state_dict())) == names
    net(torch.ones(16, 8)).sum().backward()
    assert seen == ["before", "after"]


# --- the keys ------------------------------------------------------------------------------------------------------


def job_of(*words: str) -> Job:
    return Job.of(resolve(validate(compose_fast(["launcher.accelerator=cpu", *words]))))


@pytest.mark.parametrize("word", ["maybe", "every_0", "every_x", "every_", "every_2x", "2"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "zero3"])
def test_wrong_word_gets_one_line(strategy: str, word: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        job_of(f"strategy={strategy}", f"strategy.activation_checkpointing={word}")
    line = str(refusal.value)
    assert line.startswith("strategy.activation_checkpointing: Input should be 'none' or 'full' or ")
    assert line.endswith(f"(got {word!r})." if word != "2" else "(got 2).")
    assert "\n" not in line


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme"])
def test_checkpointing_needs_blocks_under_every_strategy(strategy: str) -> None:
    assert "blocks" not in job_of(f"strategy={strategy}").strategy.needs
    job = job_of(f"strategy={strategy}", "strategy.activation_checkpointing=every_2")
    assert "blocks" in job.strategy.needs


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["strategy=zero3", "strategy.unit=module"], "strategy.unit=block"),
        (["strategy=zero3_nvme"], "strategy.offload.parameters=cpu"),
    ],
)
def test_blocks_that_are_gathered_in_pieces_are_not_compiled(words: list[str], fix: str) -> None:
    with pytest.raises(ConfigError, match=f"compile=true: .* set {fix}, or compile=false"):
        job_of(*words, "compile=true")
