"""Initial weights follow from the seed and the module's name alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from launch.compose import compose
from launch.schema import validate
from launch.worker import build_model
from strategies.engines.materialize import materialize
from tests.agreement.cases import Case
from tests.agreement.training import train_case
from tracking.evidence import Evidence

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)


def made(seed: int, dtype: torch.dtype = torch.float32) -> Tied:
    with torch.device("meta"):
        net = Tied().to(dtype)
    materialize(net, CPU, seed)
    return net


def test_same_seed_gives_the_same_weights_whatever_came_before() -> None:
    first = made(1)
    torch.rand(17)
    second = made(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.first.weight, made(2).first.weight)
    assert not torch.equal(first.first.bias, first.second.bias)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made(1)
    assert torch.equal(torch.rand(3), expected)


def test_shared_parameter_stays_one_with_its_first_owners_values() -> None:
    net = made(1)
    assert net.first.weight is net.second.weight
    with torch.device("meta"):
        alone = nn.Linear(4, 4)
    materialize(nn.ModuleDict({"first": alone}), CPU, 1)
    assert torch.equal(net.first.weight, alone.weight)


def test_buffers_get_their_first_values() -> None:
    buffers = dict(made(1).norm.named_buffers())
    assert torch.equal(buffers["running_var"], torch.ones(4))
    assert int(buffers["num_batches_tracked"]) == 0


def test_wider_format_holds_the_same_values() -> None:
    assert torch.equal(made(1, torch.float64).first.weight, made(1).first.weight.double())


def test_eager_net_keeps_its_values() -> None:
    net = nn.Linear(3, 3)
    before = net.weight.detach().clone()
    materialize(net, CPU, 1)
    assert torch.equal(net.weight, before)


def test_module_that_cannot_initialise_itself_is_named() -> None:
    class Lonely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3, device="meta"))

    with pytest.raises(ValueError, match=r"Lonely at 0 holds scale but gives them no values, and has no"):
        materialize(nn.Sequential(Lonely()), CPU, 1)


def test_weights_are_the_same_at_every_world_size(tmp_path: Path) -> None:
    """A learning rate of zero leaves every rank with its initial weights."""
    held = []
    for world_size in (1, 2, 4):
        case = Case(world_size=world_size)
        overrides = [word for word in case.overrides if not word.startswith("optimizer.lr")]
        evidence: Evidence = train_case([*overrides, "optimizer.lr=0.0"], tmp_path / str(world_size))
        held += evidence.weights
    model = build_model(validate(compose([*Case().overrides])))
    model.configure_model()
    materialize(model, CPU, seed=1)
    expected = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert len(held) == 7
    for weights in held:
        assert weights.keys() == expected.keys()
        assert all((weights[name] == expected[name]).all() for name in expected)
