"""Where a faulty run parts from one process: the module, its value or gradient, the micro-batch, the rank."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor, nn

from tests.agreement.cases import Case, own
from tests.agreement.faults import NotAveraged
from tests.agreement.training import train_case
from tests.tiers import in_tiers
from tracking.agreement import MARGIN, UNIT_ROUNDOFF
from tracking.bisect import Parting, first_parting
from tracking.evidence import Evidence

STEP = 1
JUDGE = Parting(MARGIN, UNIT_ROUNDOFF["float32"])


class GivesMore(pl.Callback):
    """One module's output is 1 % more on rank 1, in the second step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == STEP and not hasattr(self, "handle"):
            self.handle = module_of(pl_module).register_forward_hook(self.change)

    def change(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 1.01


class GetsMore(GivesMore):
    """One module's gradient is 1 % more on rank 1, in the second step."""

    def change(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * 1.01)
        return output


class WeighsMore(pl.Callback):
    """The loss of rank 1 counts twice."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = pl_module.training_step
        pl_module.training_step = lambda *args: step(*args) * (1 + trainer.global_rank)


class StepsMore(pl.Callback):
    """A parameter is changed between the first step and the second."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP and not hasattr(self, "done"):
            self.done = True
            module_of(pl_module).up.weight.data.mul_(1.01)


def module_of(pl_module: Any) -> Any:
    return pl_module.get_submodule("net.1" if "1" in pl_module.net._modules else "net.2")


def parting(case: Case, folder: Path, fault: type | None) -> str:
    words = [*case.overrides, f"evidence_step={STEP}"]
    size = case.micro_batch_size // (2 if case.strategy == "pipeline" else 1)
    alone = [word for word in words if not word.startswith(("strategy", "launcher.devices", "data.micro_batch_size"))]
    plain = [*alone, "strategy=single", "evidence=plain", f"data.micro_batch_size={size}"]
    more = ["strategy.micro_batches=2"] if case.strategy == "pipeline" else []
    exact: Evidence = train_case([*plain, "precision=fp64"], folder / "exact")
    reference = train_case(plain, folder / "reference")
    candidate = train_case([*words, *more], folder / "candidate", fault)
    return first_parting(exact, reference, candidate, STEP, JUDGE)


PARTINGS = [
    ("ddp", GivesMore, "In step 1 what net.1 gives is the first to be another, in micro-batch 1, on rank 1."),
    ("zero3", GivesMore, "In step 1 what net.1 gives is the first to be another, in micro-batch 1, on rank 1."),
    (
        "fsdp",
        GetsMore,
        "what net.1 gets back as its output's gradient is the first to be another, in micro-batch 1",
    ),
    (
        "zero2",
        GetsMore,
        "what net.1 gets back as its output's gradient is the first to be another, in micro-batch 1",
    ),
    ("pipeline", GivesMore, "In step 1 what net.2 gives is the first to be another, in micro-batch 0, on rank 1."),
    (
        "ddp",
        NotAveraged,
        "Before step 1 parameter net.0.weight is another on rank 0: the update of step 0 has",
    ),
    ("ddp", WeighsMore, "Before step 1 parameter net.0.weight is another on rank 0"),
    ("ddp", StepsMore, "Before step 1 parameter net.1.up.weight is another on rank 0"),
    ("tensor", None, "shows no module and no parameter that is another"),
    ("pipeline", None, "shows no module and no parameter that is another"),
    ("zero3", None, "shows no module and no parameter that is another"),
]


@pytest.mark.parametrize(("strategy", "fault", "said"), in_tiers(PARTINGS, [PARTINGS[0], PARTINGS[2], PARTINGS[-2]]))
def test_a_run_parts_where_its_fault_is(strategy: str, fault: type | None, said: str, tmp_path: Path) -> None:
    case = own("Blocks", strategy=strategy, world_size=2, accumulation=2)
    assert said in parting(case, tmp_path, fault)


def test_losses_that_weigh_unlike_are_told() -> None:
    truth = evidence([1.0, 1.0], [2.0, 2.0])
    for gradient, said in ((1.0, "0.5 times that of micro-batch 0"), (0.0, "0 times that of micro-batch 0")):
        wrong = evidence([1.0, 1.0], [2.0, gradient])
        assert f"at the loss of micro-batch 1 is {said}" in first_parting(truth, truth, wrong, 0, JUDGE)


def evidence(values: list[float], gradients: list[float]) -> Evidence:
    """Of one rank with a module that gives, and gets back, a number in each micro-batch."""
    calls = [
        {"fqn": "net", "kind": kind, "number": number, "digest": [1, abs(amount), amount, amount]}
        for kind, amounts in (("value", values), ("gradient", gradients))
        for number, amount in enumerate(amounts)
    ]
    weights = {when: {"net.weight": [1, 1.0, 1.0, 1.0]} for when in ("before", "behind")}
    held = {"slicing": {"num_replicas": 1, "rank": 0}, "weights": weights, "calls": calls}
    return Evidence(samples=[], losses=[], gradient_norms=[], val_losses=[], weights=[], modules=[held])
