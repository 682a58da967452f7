"""What the meter says, against what really happened in a small training under a real Trainer."""

import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader

from tests.harness import run_ranks
from tests.tracking.slow import Slow, Values, fit
from tracking.meter import Meter, measure_peak_flops
from tracking.record import Results
from tracking.steps import traced_steps, warmup_steps


class SaveEachStep(pl.Callback):
    """Writes a checkpoint after every `every`-th optimizer step, and is slow at it."""

    def __init__(self, path: Path, every: int, seconds: float) -> None:
        self.path, self.every, self.seconds = path, every, seconds

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)
            time.sleep(self.seconds)


def meter(log_every_steps: int = 5, **keys: Any) -> Meter:
    return Meter(samples_per_step=4, tokens_per_sample=8, log_every_steps=log_every_steps, **keys)


pytestmark = [
    # Lightning's advice about loaders, which these four numbers do not need.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning"),
    # Lightning 2.6 still asks torch's pytree in the way that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_train_loss_is_the_mean_of_the_micro_batch_losses_since_the_row_before(tmp_path: Path, accumulate: int) -> None:
    measured = meter()
    rows = fit(tmp_path, Slow(), measured, max_steps=12, accumulate=accumulate)
    assert [int(row["step"]) for row in rows] == [5, 10, 12]
    first = 0
    for row in rows:
        last = int(row["step"]) * accumulate
        assert float(row["train/loss"]) == pytest.approx(sum(range(first, last)) / (last - first))
        first = last
    assert measured.results().train_loss == float(rows[-1]["train/loss"])
    assert measured.results().steps == 12


def true_step_ms(module: Slow, accumulate: int = 1) -> float:
    """Median time between the ends of the optimizer steps after the first two, by the module's own clock."""
    ends = module.ended[accumulate - 1 :: accumulate]
    return 1000 * statistics.median(later - sooner for sooner, later in pairwise(ends[1:]))


def test_step_time_is_that_of_the_training_step_without_the_warm_up(tmp_path: Path) -> None:
    measured, module = meter(flops_per_sample=1e6, peak_flops=1e9), Slow(step_s=0.02)
    fit(tmp_path, module, measured, max_steps=20)
    results = measured.results()
    assert results.step_ms_p50 == pytest.approx(true_step_ms(module), abs=3)
    assert results.step_ms_p50 is not None and results.step_ms_p50 >= 20
    assert results.step_ms_p95 is not None and results.step_ms_p95 < 150  # the two slow first steps are 200 ms each
    assert results.tokens_per_s == pytest.approx(4 * 8 * 1000 / results.step_ms_p50)
    assert results.mfu == pytest.approx(1e6 * 4 * 1000 / results.step_ms_p50 / 1e9)
    assert len(measured._step_s) == 18


def test_step_time_counts_all_micro_batches_and_the_wait_for_data(tmp_path: Path) -> None:
    measured, module = meter(), Slow(step_s=0.004, fetch_s=0.006)
    fit(tmp_path, module, measured, max_steps=10, accumulate=3)
    results = measured.results()
    assert results.step_ms_p50 == pytest.approx(true_step_ms(module, accumulate=3), abs=4)
    assert results.step_ms_p50 is not None and results.step_ms_p50 >= 3 * (4 + 6)


def test_validation_time_is_not_counted(tmp_path: Path) -> None:
    measured = meter()
    module = Slow(step_s=0.01, validation_s=0.4)
    fit(tmp_path, module, measured, max_steps=6, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=1)
    assert len(measured._step_s) == 4
    assert 0.01 <= min(measured._step_s) <= max(measured._step_s) < 0.2


def test_a_step_with_a_checkpoint_in_it_is_left_out(tmp_path: Path) -> None:
    measured = meter()
    fit(tmp_path, Slow(step_s=0.01), measured, SaveEachStep(tmp_path / "x.ckpt", 4, 0.4), max_steps=13)
    assert len(measured._step_s) == 13 - 2 - 3  # two of warm-up; a checkpoint lies before steps 5, 9 and 13
    assert max(measured._step_s) < 0.2


def test_validation_metrics_are_logged_under_the_number_of_finished_steps(tmp_path: Path) -> None:
    measured = meter()
    rows = fit(tmp_path, Slow(), measured, max_steps=10, limit_val_batches=4, val_check_interval=5)
    assert {row["step"]: float(row["val/loss"]) for row in rows if row["val/loss"]} == {"5": 1.5, "10": 1.5}
    assert measured.results().val_loss == 1.5
    assert measured.results().val_metrics == pytest.approx({"val/loss": 1.5, "val/accuracy": 0.15})


def test_learning_rate_is_the_one_that_the_step_used(tmp_path: Path) -> None:
    rows = fit(tmp_path, Slow(), meter(log_every_steps=1), max_steps=3)
    assert [float(row["optim/lr"]) for row in rows] == pytest.approx([1, 1 / 2, 1 / 3])


def test_what_is_offered_joins_the_row_and_is_asked_for_only_then(tmp_path: Path) -> None:
    asked = []

    def offers() -> dict[str, Tensor]:
        asked.append(True)
        return {"optim/grad_norm": torch.tensor(0.5)}

    rows = fit(tmp_path, Slow(), meter(offers=offers), max_steps=10)
    assert [row["optim/grad_norm"] for row in rows] == ["0.5", "0.5"]
    assert len(asked) == 2


def test_a_run_no_longer_than_its_warm_up_has_a_loss_but_no_times(tmp_path: Path) -> None:
    measured = meter()
    rows = fit(tmp_path, Slow(), measured, max_steps=2)
    assert "perf/step_ms" not in rows[0]
    results = measured.results()
    assert (results.step_ms_p50, results.tokens_per_s, results.mfu) == (None, None, None)
    assert results.train_loss == 0.5


def test_warm_up_follows_its_rule() -> None:
    assert [warmup_steps(steps) for steps in (1, 20, 50, 100, 10_000)] == [2, 2, 5, 10, 10]


def test_traced_steps_lie_behind_the_warm_up_or_at_the_end() -> None:
    assert list(traced_steps(1, 200, 2)) == [11, 12]
    assert list(traced_steps(101, 120, 3)) == [103, 104, 105]  # of a run that goes on from step 100
    assert list(traced_steps(1, 4, 2)) == [4]  # two would leave none to be timed
    assert list(traced_steps(1, 1, 2)) == [1]
    assert list(traced_steps(1, 200, 0)) == list(traced_steps(6, 5, 2)) == []


@pytest.mark.parametrize(("max_steps", "timed"), [(20, 18 - 2), (4, 2 - 1), (3, 1)])
def test_traced_steps_are_left_out_of_the_times_unless_there_are_no_others(
    max_steps: int, timed: int, tmp_path: Path
) -> None:
    measured = meter(trace_steps=2)
    fit(tmp_path, Slow(step_s=0.001), measured, max_steps=max_steps)
    assert len(measured._step_s) == timed
    assert measured.results().warmup_rule.endswith(", and so are the steps that were traced")


def test_peak_memory_is_that_of_a_process_that_holds_torch(tmp_path: Path) -> None:
    measured = meter(started_at=time.time() - 5)
    fit(tmp_path, Slow(), measured)
    results = measured.results()
    assert len(results.peak_gib) == 1 and 0.1 < results.peak_gib[0] < 16
    assert results.memory_source == "resident set"
    assert 5 <= results.startup_s < results.wall_s < 60


def test_matmul_peak_is_in_the_range_of_a_processor_and_quick() -> None:
    start = time.perf_counter()
    flops = measure_peak_flops(torch.float32, torch.device("cpu"))
    assert 1e9 < flops < 1e14
    assert time.perf_counter() - start < 2


@pytest.mark.full
def test_the_meter_costs_less_than_a_millisecond_a_step(tmp_path: Path) -> None:
    """1 % of a 100 ms step, its rows included; the trainer's own cost is subtracted by running without it."""

    def seconds(folder: Path, *callbacks: pl.Callback) -> float:
        start = time.process_time()
        fit(folder, Slow(), *callbacks, max_steps=300)
        return time.process_time() - start

    bare = min(seconds(tmp_path / f"bare{turn}") for turn in range(2))
    with_meter = min(seconds(tmp_path / f"meter{turn}", meter(log_every_steps=10)) for turn in range(2))
    assert (with_meter - bare) / 300 < 0.001


def train_rank(folder: Path) -> None:
    """One of two ranks: the losses of rank r are r, r + 1, ...; both write down what they measured."""
    rank = int(os.environ["RANK"])
    measured = meter(log_every_steps=2, peak_flops=1e9 * (1 + rank), flops_per_sample=1e3)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[TorchElasticEnvironment()],
        max_steps=4,
        limit_val_batches=0,
        callbacks=[measured],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(Values(0.0, first=rank), batch_size=1)
    trainer.fit(Slow(step_s=0.005 * (1 + rank)), loader)
    (folder / f"{rank}.json").write_text(measured.results().model_dump_json())


def test_two_ranks_agree_on_the_mean_loss_and_list_both_memories(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, train_rank, tmp_path)
    first, second = (Results.model_validate_json((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.train_loss == second.train_loss == pytest.approx((2 + 3 + 3 + 4) / 4)
    assert first.peak_flops_per_device == second.peak_flops_per_device == 1.5e9
    assert first.peak_gib == second.peak_gib and len(first.peak_gib) == 2
