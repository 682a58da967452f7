"""A grid's parts on models that trip them: ties, splits, the shards' optimizer, gradients that are not everywhere."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  # its functions are ranks
from torch import Tensor, nn

from strategies.engines import shards
from strategies.engines.shards import average
from strategies.engines.ties import Tie, Ties
from tests.agreement.cases import Case, own
from tests.agreement.training import train_case
from tests.harness import run_ranks
from tests.tiers import in_tiers
from tracking.agreement import Draw, compare

REPLICATE = "strategy.shard_ranks=1"


def part(name: str, strategy: str, **case: Any) -> Case:
    return own(f"part_models.{name}", strategy=strategy, **case)


AGREE = [
    ("pipeline", "FrozenTie", []),
    ("pipeline", "SharedModule", []),
    ("pipeline", "FrozenFirstHalf", []),
    ("tensor", "Tokens", []),
    ("tensor", "PadsFirst", []),
    ("fsdp", "TiedInTwoWays", []),
    ("fsdp", "Chooses", [REPLICATE]),
]


@pytest.mark.parametrize(
    ("strategy", "name", "words"), in_tiers(AGREE, AGREE[1:4:2]), ids=lambda part: part if str(part) else ""
)
def test_trains_as_on_one_process(strategy: str, name: str, words: list[str], tmp_path: Path) -> None:
    case = part(name, strategy, optimizer="sgd" if name == "Chooses" else "adamw")
    candidate = train_case([*case.overrides, *words], tmp_path / "candidate")
    exact = train_case(case.exact_overrides, tmp_path / "exact")
    reference = train_case(case.reference_overrides, tmp_path / "reference")
    checks = compare([Draw(exact, reference)], candidate, master="float32")
    assert [check for check in checks if not check.passed] == []


ZBV = "strategy.schedule=zbv"
REFUSED = [
    ("pipeline", "SharedModule", [ZBV], "net.4.up is the same Linear object as net.1.up, and both come to lie on pipe"),
    ("tensor", "TiedInTwoWays", [], "one parameter stands in net.1.up.weight (colwise), net.2.down.weight (rowwise)"),
    ("tensor", "ScalesTokens", [], "0 is called embedding, but Scaled.forward is not nn.Embedding's"),
    ("tensor", "BoundsTokens", [], "0 is called embedding, but has max_norm=1.0"),
    ("tensor", "Sloped", [], "a whole copy of parameter net.1.slope.weight, but a gradient of its own"),
    ("fsdp", "SearchesLine", [REPLICATE], "but LBFGS looks at all of them at once"),
    ("pipeline", "ClipsByItself", [], "and ClipsByItself.configure_gradient_clipping by that of what one rank holds"),
    ("fsdp", "ClipsByItself", [], "and ClipsByItself.configure_gradient_clipping by that of what one rank holds"),
    (
        "pipeline",
        "ZeroesByItself",
        [],
        "lets go of gradients by itself, whatever ZeroesByItself.optimizer_zero_grad does",
    ),
    ("pipeline", "GivesTrained", [], "rank 0 has no parameter to train, since those of its pipeline stages are frozen"),
    ("pipeline", "GivesEmptyGroup", [], "rank 0 has no parameter to train, since those of its pipeline stages are"),
]


@pytest.mark.parametrize(
    ("strategy", "name", "words", "said"), in_tiers(REFUSED, REFUSED[1:2]), ids=lambda part: part if str(part) else ""
)
def test_what_cannot_be_right_is_refused_by_name(
    strategy: str, name: str, words: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="ValueError") as failure:
        train_case([*part(name, strategy).overrides, *words], tmp_path)
    assert said in " ".join(str(failure.value).split())


def test_every_rank_says_which_copies_would_drift_apart(tmp_path: Path) -> None:
    """The ranks of the stage without such a parameter, too, which would wait for the others for ever."""
    case = part("Sloped", "3d", world_size=4)
    words = ["strategy.mesh={pipe:2,data:1,tensor:2}", "data.micro_batch_size=16"]
    with pytest.raises(AssertionError, match=r"ranks \[0, 1, 2, 3\] of 4 failed"):
        train_case([*case.overrides, *words], tmp_path)
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(4)]
    assert all("parameter net.1.slope.weight" in log for log in logs)


def alone() -> None:
    dist.init_process_group("gloo")


def average_unevenly() -> None:
    alone()
    both, one = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    both.grad = torch.full((3,), 1.0 + dist.get_rank())
    if dist.get_rank() == 0:
        one.grad = torch.full((2,), 4.0)
    assert dist.group.WORLD is not None
    average([both, one], dist.group.WORLD, torch.float32)
    assert both.grad.tolist() == [1.5] * 3
    assert one.grad is not None
    assert one.grad.tolist() == [2.0] * 2


def test_gradient_that_one_rank_lacks_counts_as_zeros(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, average_unevenly)


def average_bucket_by_bucket() -> None:
    alone()
    parameters = [nn.Parameter(torch.zeros(8)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(8)
    made: list[weakref.ref[Tensor]] = []
    cat = torch.cat

    def watched(tensors: Any) -> Tensor:
        assert [flat for flat in made if flat() is not None] == []
        flat = cat(tensors)
        made.append(weakref.ref(flat))
        return flat

    shards.BUCKET_BYTES, torch.cat = 32, watched  # type: ignore[assignment]
    dist.all_reduce = lambda *_, **__: None  # gloo's own thread lets go of a tensor when it likes
    assert dist.group.WORLD is not None
    average(parameters, dist.group.WORLD, torch.float32)
    assert len(made) == 3


def test_one_bucket_is_gone_before_the_next_is_made(tmp_path: Path) -> None:
    run_ranks(1, tmp_path, average_bucket_by_bucket)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(4))


STAGES = {0: [0, 3], 1: [1, 2]}  # of each rank, as zbv lays them


def sum_copies(gradients: dict[int, float], expected: float | None) -> None:
    alone()
    rank, module = dist.get_rank(), Holder()
    batched: list[int] = []
    batch = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        batched.append(len(operations))
        return batch(operations)

    dist.batch_isend_irecv = counted  # type: ignore[assignment]
    assert dist.group.WORLD is not None
    tie = Tie({stage: [f"places.{stage}"] for stage in range(4)})
    ties = Ties(module, [tie], set(STAGES[rank]), dist.group.WORLD, lambda stage: int(stage in STAGES[1]))
    for stage, value in gradients.items():
        if stage in STAGES[rank]:
            module.places[stage].grad = torch.full((2,), value)
    ties.sum_gradients()
    for stage in STAGES[rank]:
        found = module.places[stage].grad
        assert (found if found is None else found.tolist()) == (expected if expected is None else [expected] * 2)
    # One batch, since NCCL would wait for ever if both ranks first received: two copies to send, two to take.
    assert batched == ([] if expected is None else [4])


@pytest.mark.parametrize(
    ("gradients", "expected"), [({0: 1.0, 1: 2.0, 2: 4.0, 3: 8.0}, 15.0), ({1: 2.0}, 2.0), ({}, None)]
)
def test_copies_get_the_sum_and_none_where_no_copy_has_a_gradient(
    gradients: dict[int, float], expected: float | None, tmp_path: Path
) -> None:
    run_ranks(2, tmp_path, sum_copies, gradients, expected)


def clip_nothing() -> None:
    alone()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    spec: Any = SimpleNamespace(mesh=SimpleNamespace(data_ranks=1, world_size=1), tensor=1)
    held = shards.Shards(optimizer, spec, set(), "pipeline")
    held.connect()
    held.take_gradients()
    held.scale_to(1.0, held.norm())
    assert held.norm().item() == 0.0


def test_rank_without_a_gradient_has_a_norm_of_zero(tmp_path: Path) -> None:
    run_ranks(1, tmp_path, clip_nothing)
