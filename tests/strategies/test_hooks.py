"""A module's own hooks: called as often as by plain Lightning, with the same outcome, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import preflight
from launch.job import run_of
from launch.schema import ConfigError
from tests.agreement.cases import own
from tests.agreement.training import job_of, train_case
from tests.strategies.hook_models import HOOKS, counting
from tests.tiers import in_tiers

STRATEGIES = ("single", "ddp", "zero2", "zero3", "fsdp", "tensor", "pipeline")
REFUSED = {
    "zero2": {"backward", "configure_gradient_clipping", "optimizer_zero_grad"},
    "zero3": {"backward", "configure_gradient_clipping", "optimizer_zero_grad"},
    "fsdp": {"configure_gradient_clipping", "optimizer_zero_grad"},
    "tensor": {"configure_gradient_clipping", "optimizer_zero_grad"},
    "pipeline": {"backward", "configure_gradient_clipping", "optimizer_zero_grad"},
}
COUNTED = [("single", "CountsAll"), ("ddp", "CountsAll")]
COUNTED += [(strategy, "CountsBackward") for strategy in ("fsdp", "tensor")]
COUNTED += [(strategy, "CountsOthers") for strategy in ("zero2", "zero3", "pipeline")]


def ranks_of(strategy: str) -> int:
    return 1 if strategy == "single" else 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hooks_that_an_engine_does_the_work_of_are_refused_by_name(strategy: str, tmp_path: Path) -> None:
    job = job_of(own("hook_models.Counts", strategy=strategy, world_size=ranks_of(strategy)).overrides, tmp_path)
    refused = set()
    for hook in HOOKS:
        module = counting(hook)(None, None, None)  # type: ignore[arg-type]
        module.configure_model()
        try:
            job.strategy.check_module(module, run_of(job.config, job.data, "cpu"))
        except ValueError as error:
            assert f"{type(module).__name__}.{hook}" in str(error)
            refused.add(hook)
    assert refused == REFUSED.get(strategy, set())


def counts(overrides: list[str], folder: Path) -> list[dict[str, int]]:
    train_case(overrides, folder)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("counts.*.json"))]


@pytest.mark.filterwarnings("ignore:You have overridden")  # a hook that a datamodule has, too
@pytest.mark.parametrize(("strategy", "name"), in_tiers(COUNTED, [("pipeline", "CountsOthers")]))
def test_other_hooks_are_called_as_often_as_by_plain_lightning(strategy: str, name: str, tmp_path: Path) -> None:
    case = own(f"hook_models.{name}", strategy=strategy, world_size=ranks_of(strategy))
    (wanted,) = counts(case.reference_overrides, tmp_path / "plain")
    assert wanted.keys() >= {*HOOKS} - REFUSED.get(strategy, set())
    for rank, found in enumerate(counts(case.overrides, tmp_path / "ours")):
        once_a_node = {} if rank == 0 else {"prepare_data": 1}
        assert {**found, **once_a_node} == wanted


OUTCOMES = [
    (strategy, name)
    for strategy in ("ddp", "fsdp", "tensor", "pipeline")
    for name in ("hook_models.StepsEverySecond", "ClosesTwice")
]
OUTCOMES += [("pipeline", "hook_models.TakesNoNumber")]
EVERYDAY = [("fsdp", "hook_models.StepsEverySecond")]


@pytest.mark.parametrize(("strategy", "name"), in_tiers(OUTCOMES, EVERYDAY))
def test_steps_of_a_module_s_own_are_plain_lightning_s(strategy: str, name: str, tmp_path: Path) -> None:
    case = own(name, strategy=strategy, world_size=ranks_of(strategy), optimizer="sgd")
    plain = train_case(case.reference_overrides, tmp_path / "plain")
    ours = train_case(case.overrides, tmp_path / "ours")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    for norms in zip(*ours.gradient_norms, strict=True):
        assert list(norms) == pytest.approx([norms[0] for norms in plain.gradient_norms], rel=1e-4)


@pytest.mark.full
def test_step_of_zero_may_leave_out_the_batch_s_number(tmp_path: Path) -> None:
    assert train_case(own("hook_models.TakesNoNumber", strategy="zero2").overrides, tmp_path).losses


@pytest.mark.full
def test_end_of_an_epoch_that_a_module_asks_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"EndsEpoch\.on_train_batch_start returns -1"):
        train_case(own("hook_models.EndsEpoch", strategy="single", world_size=1).overrides, tmp_path)


def test_step_that_fetches_its_batches_is_refused(tmp_path: Path) -> None:
    job = job_of(own("hook_models.FetchesByItself", strategy="single", world_size=1).overrides, tmp_path)
    with pytest.raises(ConfigError, match=r"model: FetchesByItself\.training_step takes dataloader_iter"):
        preflight.check(job)
