"""Data of the user's own under strategies: a step has the samples of one process, and a run goes on with the next."""

import re
from pathlib import Path

import numpy as np
import pytest

from strategies.checkpoint import Manifest, folder_of
from tests.agreement.training import job_of, run_job, train_case, train_rank
from tests.tiers import in_tiers
from tracking.agreement import Draw, compare
from tracking.record import RunRecord

STEPS, SAVED = 6, 3
OWN = [
    "model=vit_tiny",
    "model.net=null",
    "model._target_=tests.datamodules.own_modules.Small",
    "data=own",
    "data.module._target_=tests.datamodules.own_modules.Numbers",
    "data.global_batch_size=16",
    "data.micro_batch_size=4",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "trainer.clip_norm=null",
    f"trainer.max_steps={STEPS}",
    "logger=none",
    "launcher.accelerator=cpu",
]
COMPARED = [*OWN, "evidence=true"]
WHOLE = ["strategy=single", "data.micro_batch_size=16", "data.loader_batch_size=4"]
WEIGHTED = "+data.module.order=weighted"


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Plain Lightning on the same module, which takes each step's samples at once."""
    folder = tmp_path_factory.mktemp("references")
    words = [*COMPARED, *WHOLE, "evidence=plain"]
    return Draw(train_case([*words, "precision=fp64"], folder / "exact"), train_case(words, folder / "reference"))


WAYS = {"ddp": 2, "zero2": 2, "fsdp": 4, "pipeline": 2}


@pytest.mark.parametrize("strategy", in_tiers(list(WAYS), ["ddp", "pipeline"]))
def test_a_strategy_trains_on_the_users_samples_as_plain_lightning_does(
    strategy: str, references: Draw, tmp_path: Path
) -> None:
    candidate = train_case([*COMPARED, f"strategy={strategy}", f"launcher.devices={WAYS[strategy]}"], tmp_path)
    checks = compare([references], candidate, master="float32", parameter="float32")
    assert [check for check in checks if not check.passed] == []
    assert len(set(candidate.samples[0])) == 16


def test_a_run_goes_on_under_another_strategy_and_world_size_at_the_next_sample(tmp_path: Path) -> None:
    words = [*COMPARED, WEIGHTED]
    whole = train_case(
        [*words, "strategy=ddp", "launcher.devices=2", f"checkpoint.every_steps={SAVED}"], tmp_path / "1"
    )
    saved = folder_of(tmp_path / "1", SAVED)
    assert Manifest.read(saved).trained["data.order"] == "by WeightedRandomSampler"
    resumed = train_case([*words, "strategy=fsdp", "launcher.devices=4", f"resume='{saved}'"], tmp_path / "2")
    assert [sorted(step) for step in resumed.samples] == [sorted(step) for step in whole.samples[SAVED:]]
    assert np.allclose(resumed.losses, whole.losses[SAVED:], rtol=1e-5)
    log = (tmp_path / "2/rank0.log").read_text()
    assert re.findall(r"epoch (\d+) ends at step (\d+)", log)[0] == ("1", "6")
    with pytest.raises(AssertionError, match=r"data\.samples=40, but the checkpoint was written with data\.samples=44"):
        train_case(
            [
                *words,
                "+data.module.num_samples=40",
                f"resume='{saved}'",
                "strategy=single",
                "resume_despite=[data.module.num_samples]",
            ],
            tmp_path / "3",
        )


@pytest.mark.full
def test_data_that_can_only_be_iterated_train_and_are_compared_on_one_data_rank(tmp_path: Path) -> None:
    words = [*COMPARED, "+data.module.order=iterable"]
    alone = train_case([*words, *WHOLE, "evidence=plain"], tmp_path / "whole")
    staged = train_case([*words, "strategy=pipeline", "launcher.devices=2"], tmp_path / "pipeline")
    assert staged.samples == alone.samples
    assert np.allclose(staged.losses, alone.losses, rtol=1e-5)


ITERABLE = "+data.module.order=iterable"
REFUSED = {
    "ranks": (
        [ITERABLE, "strategy=ddp", "launcher.devices=2"],
        r"data\.module: Passed, of Numbers's training, .*splits_itself=true",
    ),
    "checkpoints": (
        [ITERABLE, "checkpoint.every_steps=2"],
        r"checkpoint: data that can only be iterated cannot be read from the middle on; give ",
    ),
    "schedules": (
        [ITERABLE, "model._target_=tests.datamodules.own_modules.PerEpoch"],
        r"model: StepLR is stepped per epoch, and .* give its lr_scheduler interval='step'",
    ),
    "state": (
        ["data.module._target_=tests.datamodules.own_modules.Remembers", "checkpoint.every_steps=2"],
        r"checkpoint: Remembers\.state_dict is not kept; let what it says follow from the optimizer step",
    ),
}


@pytest.mark.parametrize("case", in_tiers(list(REFUSED), ["checkpoints"]))
def test_what_data_of_the_users_own_cannot_do_is_refused(case: str, tmp_path: Path) -> None:
    words, line = REFUSED[case]
    with pytest.raises(AssertionError, match=line):
        train_case([*OWN, "strategy=single", *words], tmp_path)


def test_the_record_says_the_order_of_samples_and_what_one_costs(tmp_path: Path) -> None:
    job = job_of([*OWN, WEIGHTED, "strategy=ddp", "launcher.devices=2"], tmp_path)
    run_job(job, train_rank, job, None, None)
    record = RunRecord.read(tmp_path / "record.json")
    assert (record.batch.global_, record.batch.micro, record.batch.order) == (16, 4, "by WeightedRandomSampler")
    # A multiply-add is 2 FLOPs; backward makes two products of each matrix, but one of the first, which has no input
    # gradient.
    products = [64 * 32, 32 * 32, 32 * 10]
    assert record.model_stats.flops_per_sample == 2 * (3 * sum(products) - products[0])
