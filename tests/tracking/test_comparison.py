"""A comparison's figures are those of its runs, and its sentences are chosen by the figures."""

import math
from itertools import pairwise
from typing import Any

import pytest

from tests.tracking.examples import found, record
from tests.tracking.runs import GIB, failed, measured, run, trace
from tracking.certified import Verdict, subject_of
from tracking.comparison import Comparison, RunFigures, Series, compare_runs
from tracking.conclusions import conclusions
from tracking.gantt import Bar, idle_share, spent_ms
from tracking.history import column_of, history_of
from tracking.record import Environment, Precision
from tracking.shown import MOST_RANKS, shown_ranks
from tracking.sources import Run


def figures(comparison: Comparison, label: str) -> RunFigures:
    return next(one for one in comparison.runs if one.label == label)


def series(comparison: Comparison, label: str) -> Series:
    return next(one for one in comparison.series if one.label == label)


def said(*runs: Any) -> str:
    return " ".join(conclusions(compare_runs(runs)))


def test_the_reference_is_single_and_otherwise_the_first_that_completed() -> None:
    assert compare_runs([run("ddp"), run("single")]).reference == "single"
    assert compare_runs([failed("zero1"), run("ddp"), run("fsdp")]).reference == "ddp"
    assert compare_runs([failed("zero1")]).reference is None


def test_speed_up_and_efficiency_are_against_the_reference_and_its_devices() -> None:
    comparison = compare_runs([run("single", tokens_per_s=1000), run("ddp", tokens_per_s=1600, ranks=2)])
    ddp = figures(comparison, "ddp")
    assert (ddp.speed_up, ddp.efficiency, ddp.tokens_per_s_per_device) == (1.6, 0.8, 800.0)
    of_four = compare_runs([run("ddp", tokens_per_s=1000, ranks=2), run("fsdp", tokens_per_s=1500, ranks=4)])
    fsdp = figures(of_four, "fsdp")
    assert (fsdp.speed_up, fsdp.efficiency) == (1.5, 0.75)


def test_losses_are_subtracted_step_by_step() -> None:
    other = run("ddp", losses=(4.5, 3.0, 1.75))
    other.history["train/loss"] = column_of({10: 4.5, 30: 1.75})
    ddp = figures(compare_runs([run("single"), other]), "ddp")
    assert ddp.curve.steps == [10, 30] and ddp.curve.difference == [0.5, -0.25]
    assert (ddp.loss_difference, ddp.loss_difference_step) == (0.5, 10)


def test_tokens_and_seconds_go_with_the_steps() -> None:
    curve = figures(compare_runs([run("single", step_ms=200.0)]), "single").curve
    per_step = 16 * 64
    assert curve.tokens == [10 * per_step, 20 * per_step, 30 * per_step]
    assert curve.seconds == pytest.approx([2.0, 4.0, 6.0])


def test_rows_of_the_warm_up_take_the_median_step_s_time() -> None:
    warm = run("single", step_ms=200.0)
    warm.history["perf/step_ms"] = column_of({20: 100.0, 30: 200.0})
    assert figures(compare_runs([warm]), "single").curve.seconds == pytest.approx([2.0, 3.0, 5.0])


def test_validation_losses_stand_beside_those_of_training() -> None:
    made = run("single", step_ms=200.0, val_losses=(4.5, 3.5))
    made.history["val/loss"] = column_of({10: 4.5, 15: 4.0, 20: 3.5})
    validations = figures(compare_runs([made]), "single").curve.validations
    assert (validations.steps, validations.loss) == ([10, 15, 20], [4.5, 4.0, 3.5])
    assert validations.tokens[1] == 15 * 16 * 64 and validations.seconds == pytest.approx([2.0, 3.0, 4.0])
    repeats = [run("ddp", seed=seed, val_losses=(4.5, loss)) for seed, loss in ((1, 3.0), (2, 4.0))]
    mean = series(compare_runs(repeats), "ddp").curve.validations
    assert (mean.steps, mean.loss) == ([10, 20], [4.5, 3.5])


def test_the_target_is_the_lowest_loss_that_all_have_reached() -> None:
    comparison = compare_runs([run("single", losses=(4, 3, 2)), run("ddp", losses=(3.5, 2.5, 1))])
    assert comparison.target_loss == 2.0
    assert [one.seconds_to_target for one in comparison.runs] == pytest.approx([3.0, 3.0])
    sooner = compare_runs([run("single"), run("ddp", losses=(2.5, 2, 1))], target_loss=3.0)
    assert [one.seconds_to_target for one in sooner.runs] == pytest.approx([2.0, 1.0])
    assert compare_runs([run("single")], target_loss=1.0).runs[0].seconds_to_target is None


def test_the_front_has_what_no_other_beats_in_time_and_memory() -> None:
    comparison = compare_runs(
        [
            run("single", step_ms=400, peak_gib=2.0),
            run("ddp", step_ms=100, peak_gib=3.0),
            run("zero1", step_ms=200, peak_gib=1.5),
            run("zero3", step_ms=300, peak_gib=1.0),
            run("fsdp", step_ms=300, peak_gib=1.25),
        ]
    )
    assert {one.label for one in comparison.series if one.on_front} == {"ddp", "zero1", "zero3"}


def test_runs_that_differ_by_seed_alone_are_repeats() -> None:
    speeds = {1: 900.0, 2: 1000.0, 3: 1100.0}
    repeats = [run("ddp", tokens_per_s=speed, seed=seed) for seed, speed in speeds.items()]
    comparison = compare_runs([run("single"), *repeats, run("ddp", config={"optimizer": {"lr": 0.1}})])
    assert [len(one.runs) for one in comparison.series] == [1, 3, 1]
    spread = comparison.series[1].spreads["tokens_per_s"]
    assert (spread.mean, spread.deviation, spread.count) == (1000.0, 100.0, 3)
    assert [one.label for one in comparison.runs[1:4]] == [f"ddp lr=not there, seed {seed}" for seed in (1, 2, 3)]
    curve = comparison.series[1].curve
    assert curve.steps == [10, 20, 30] and curve.deviation == [0.0, 0.0, 0.0]


def test_a_repeat_is_compared_with_the_reference_of_its_seed() -> None:
    runs = [run("single", seed=1), run("single", seed=2, losses=(5, 4, 3)), run("ddp", seed=2, losses=(5, 4, 3.5))]
    assert figures(compare_runs(runs), "ddp").curve.difference == [0.0, 0.0, 0.5]


def test_a_difference_within_the_spread_is_none() -> None:
    ddp = [run("ddp", tokens_per_s=speed, seed=seed) for seed, speed in ((1, 1000.0), (2, 1200.0))]
    near = [run("fsdp", tokens_per_s=speed, seed=seed) for seed, speed in ((1, 950.0), (2, 1150.0))]
    far = [run("fsdp", tokens_per_s=speed, seed=seed) for seed, speed in ((1, 550.0), (2, 560.0))]
    assert "ddp and fsdp are the fastest, at about 1,100 tokens/s: what they differ by lies within the spread" in said(
        *ddp, *near
    )
    assert "ddp is the fastest" in said(*ddp, *far)


def test_the_conclusions_name_the_fastest_the_leanest_and_its_price() -> None:
    text = said(
        run("single", tokens_per_s=1000, peak_gib=4.0),
        run("ddp", tokens_per_s=1800, ranks=2, peak_gib=4.0),
        run("zero3", tokens_per_s=900, ranks=2, peak_gib=1.0),
    )
    assert (
        "ddp is the fastest at 1,800 tokens/s on 2 devices, 1.80 times single's, a parallel efficiency of 90%" in text
    )
    assert "zero3 needs the least memory, 1.00 GiB on the fullest device, 75% less than single" in text
    assert "it is 50% slower than ddp" in text


def test_the_conclusions_say_whether_losses_agree() -> None:
    assert "the same as single's at each of the 3 steps that both logged, to the last bit" in said(
        run("single"), run("ddp")
    )
    near = said(run("single"), run("ddp", losses=(4.0, 3.0, 2.000015)))
    assert "agree with single's to 5 digits" in near and "1.5e-05, ddp at step 30" in near
    far = said(run("single"), run("ddp"), run("zero1", losses=(4.0, 3.5, 2.0)))
    assert "Training losses differ from single's in zero1 (most: 5.0e-01, zero1 at step 20)" in far


def test_losses_that_differ_by_less_than_their_seeds_do_are_said_not_to() -> None:
    single = [run("single", seed=seed, losses=(4, 3, loss)) for seed, loss in ((1, 2.0), (2, 2.4))]
    ddp = [run("ddp", seed=seed, losses=(4, 3, loss)) for seed, loss in ((1, 2.1), (2, 2.5))]
    assert "at the end by no more than the spread over seeds: no difference" in said(*single, *ddp)
    far = [run("ddp", seed=seed, losses=(4, 3, loss)) for seed, loss in ((1, 4.1), (2, 4.5))]
    assert "at the end by more than the spread over seeds" in said(*single, *far)


def test_a_loss_that_is_no_number_is_told_and_hurts_nothing_else() -> None:
    comparison = compare_runs([run("single"), run("ddp", losses=(4.0, math.nan, math.nan))])
    assert "The loss of ddp is no number at some steps" in " ".join(conclusions(comparison))
    assert Comparison.model_validate_json(comparison.model_dump_json()).runs[1].label == "ddp"


def test_what_makes_runs_incomparable_is_told() -> None:
    elsewhere = record().environment.model_copy(update={"torch": "2.12.0", "device": "another"})
    half = Precision(name="bf16", parameter="float32", compute="bfloat16", reduce="float32", master="float32")
    odd = run("zero1", seed=5, changes={"environment": elsewhere, "precision": half, "data": "digits"})
    comparison = compare_runs([run("single"), run("ddp"), run("fsdp"), odd])
    told = {doubt.fact: doubt.text for doubt in comparison.doubts}
    assert told.keys() == {"data", "precision", "device", "torch", "seed", "certificate"}
    assert told["precision"].startswith("precision differs: fp32 (all others), bf16 (zero1)")
    alike = [run("single"), run("ddp")]
    assert not compare_runs(alike, certificates=[certificate_of(alike[1])]).doubts


def test_runs_of_one_config_on_other_software_are_no_repeats_and_are_warned_of() -> None:
    newer = record().environment.model_copy(update={"torch": "9.9", "device": "another"})
    comparison = compare_runs([run("single"), run("ddp"), run("ddp", seed=2, changes={"environment": newer})])
    assert [len(one.runs) for one in comparison.series] == [1, 1, 1]
    assert {"torch", "device"} <= {doubt.fact for doubt in comparison.doubts}


def test_what_another_run_trained_is_not_this_run_s_time() -> None:
    config = {"resume": "elsewhere/checkpoints/step-00000005", "run_dir": "here"}
    own = config | {"resume": "here/checkpoints/step-00000005"}
    comparison = compare_runs(
        [run("single"), run("ddp", config=config, step_ms=200.0), run("fsdp", config=own, step_ms=200.0)]
    )
    assert figures(comparison, "ddp").curve.seconds == pytest.approx([1.0, 3.0, 5.0])
    assert figures(comparison, "fsdp").curve.seconds == pytest.approx([2.0, 4.0, 6.0])
    assert [doubt.text for doubt in comparison.doubts if doubt.fact == "start"] == [
        "start differs: 0 (single, fsdp), 5 (ddp); losses and times leave out what another run has done."
    ]


def test_a_reference_that_diverged_says_nothing_of_others() -> None:
    text = said(run("single", losses=(4.0, math.nan, math.nan)), run("ddp"))
    assert "The loss of single is no number" in text
    assert "to the last bit" not in text and "Training losses" not in text


def test_agreement_is_said_of_the_steps_that_both_logged() -> None:
    other = run("ddp")
    other.history["train/loss"] = column_of({15: 9.0, 30: 2.0})
    assert "are the same as single's at the one step that both logged, to the last bit" in said(run("single"), other)


def test_a_run_that_broke_off_sets_no_target() -> None:
    broken = Run(name="zero1", strategy="zero1", state="failed", history=history_of([{"step": 1, "train/loss": 9.0}]))
    assert compare_runs([run("single"), run("ddp"), broken]).target_loss == 2.0


def test_runs_of_one_seed_tell_nothing_of_other_seeds() -> None:
    same = compare_runs([run("single"), run("single"), run("ddp", losses=(4.0, 3.0, 2.5))])
    assert same.series[0].spreads["train_loss"].deviation is None
    assert "spread over seeds" not in " ".join(conclusions(same))


def test_repeats_that_did_not_all_reach_a_loss_have_no_time_to_it() -> None:
    repeats = [run("ddp", seed=1), run("ddp", seed=2, losses=(4.0, 3.0, 2.9))]
    assert "seconds_to_target" not in compare_runs(repeats, target_loss=2.5).series[0].spreads


def test_no_secret_of_an_error_is_on_the_page() -> None:
    broken = Run(name="x", strategy="x", state="failed", error="https://bob:hunter2@host/x?api_key=sk-1 is lost")
    assert compare_runs([broken]).runs[0].error == "https://***@host/x?api_key=*** is lost"


def test_only_what_differs_in_the_configs_is_listed() -> None:
    adamw: dict[str, Any] = {"optimizer": {"lr": 0.1}, "model": {"optimizer": {"lr": 0.1}}}
    other: dict[str, Any] = {"optimizer": {"lr": 0.2}, "model": {"optimizer": {"lr": 0.2}}, "run_dir": "elsewhere"}
    comparison = compare_runs([run("single", config=adamw), run("ddp", config=other)])
    assert [one.model_dump() for one in comparison.differences] == [
        {"key": "optimizer.lr", "values": {"0.1": ["single"], "0.2": ["ddp"]}}
    ]


def test_labels_tell_runs_of_one_name_apart() -> None:
    runs = [run("ddp", ranks=2), run("ddp", ranks=4), run("fsdp"), run("fsdp", config={"optimizer": {"lr": 0.2}})]
    labels = [one.label for one in compare_runs(runs).series]
    assert labels == ["ddp x 2", "ddp x 4", "fsdp lr=not there", "fsdp lr=0.2"]
    many = [run(f"zero{number}") for number in range(10)]
    assert "zero0, zero1, zero2, zero3, zero4, zero5, zero6 and 3 others are the fastest" in said(*many)


def test_traffic_and_waiting_are_means_of_the_ranks() -> None:
    ddp = figures(compare_runs([run("ddp", ranks=2, found=measured())]), "ddp")
    assert [(part.collective, part.payload, part.seconds) for part in ddp.traffic] == [
        ("all-reduce", 6e6, 0.002),
        ("all-gather", 2e6, None),
    ]
    assert (ddp.sent_bytes, ddp.wait_share, ddp.idle_share) == (8e6, 0.2, 0.05)
    assert ddp.memory_limit == 8 * GIB and ddp.memory[1].optimizer == 2 * GIB


def test_the_gantt_is_the_last_step_of_the_trace() -> None:
    ddp = figures(compare_runs([run("ddp", ranks=2, found=measured(), trace=trace(steps=3))]), "ddp")
    assert ddp.gantt_step == 30
    assert [(bar.rank, bar.category, bar.start_ms, bar.duration_ms) for bar in ddp.gantt] == [
        (0, "forward", 0.0, 10.0),
        (0, "backward", 10.0, 20.0),
        (0, "optimizer", 30.0, 7.0),
        (0, "collective", 15.0, 10.0),
        (1, "forward", 0.1, 10.0),
        (1, "backward", 10.1, 20.0),
        (1, "optimizer", 30.1, 7.0),
        (1, "collective", 15.1, 10.0),
    ]


def test_time_in_which_a_rank_waits_is_not_time_at_work() -> None:
    def bar(category: str, start_ms: float, duration_ms: float, rank: int = 0) -> Bar:
        lane = int(category == "collective")
        kind = {"lane": lane, "category": category, "name": category, "micro_batch": None, "events": 1}
        return Bar.model_validate({"rank": rank, "start_ms": start_ms, "duration_ms": duration_ms} | kind)

    bars = [
        bar("forward", 0, 10),
        bar("idle", 4, 2),
        bar("collective", 4, 3),
        bar("backward", 10, 20),
        bar("idle", 30, 2),
    ]
    bars.append(bar("backward", 0, 40, rank=1))
    assert [spent_ms(bars, 0, kind) for kind in ("forward", "backward", "idle", "collective")] == [8, 20, 4, 3]
    assert (idle_share(bars, 0), idle_share(bars, 1)) == (0.1, 0)


@pytest.mark.parametrize("ranks", [64, 512])
def test_of_many_ranks_some_are_shown(ranks: int) -> None:
    waits, held = [0.5] * ranks, [1.0] * ranks
    waits[37], held[41] = 0.1, 1.5
    found = measured(ranks) | {"wait_share": waits, "peak_gib": held}
    zero = figures(compare_runs([run("zero3", ranks=ranks, found=found, trace=trace(ranks))]), "zero3")
    shown = zero.shown_ranks
    assert {0, 37, 41, ranks - 1} <= set(shown) and len(shown) == MOST_RANKS
    others = [rank for rank in shown if rank not in (37, 41)]
    assert {round(after - before) for before, after in pairwise(others)} <= {(ranks - 1) // 13, (ranks - 1) // 13 + 1}
    assert sorted({bar.rank for bar in zero.gantt}) == shown
    assert len(zero.memory) == len(zero.wait_share_by_rank) == MOST_RANKS
    assert zero.wait_share_by_rank[shown.index(37)] == 0.1 and zero.peak_gib_by_rank[shown.index(41)] == 1.5
    assert zero.peak_gib == 1.5 and zero.wait_share == pytest.approx(0.5, abs=0.01)
    assert shown_ranks(MOST_RANKS) == list(range(MOST_RANKS))


def test_a_run_says_what_it_lacks() -> None:
    old = run("single", found={"traced_steps": []})
    assert figures(compare_runs([old]), "single").missing == [
        "memory by category",
        "traffic",
        "no trace.json: what a step's time goes to",
    ]
    assert figures(compare_runs([failed("ddp")]), "ddp").missing == ["no record: the run did not complete"]
    whole = run("ddp", ranks=2, found=measured(), trace=trace())
    assert figures(compare_runs([whole]), "ddp").missing == []


def certificate_of(made: Run, verdict: str = "agrees", **environment: str | None) -> Verdict:
    assert made.record is not None
    content = {
        "verdict": verdict,
        "strategy": made.strategy,
        "subject": subject_of(made.record),
        "environment": made.record.environment.model_dump() | environment,
    }
    return Verdict.model_validate(content)


def test_a_run_that_nothing_certifies_is_warned_of() -> None:
    runs = [run("single"), run("ddp"), run("zero1")]
    comparison = compare_runs(runs, certificates=[certificate_of(runs[1]), certificate_of(runs[2], "disagrees")])
    assert [one.verdict for one in comparison.runs] == [None, "agrees", "disagrees"]
    assert comparison.doubts == []
    (doubt,) = compare_runs(runs, certificates=[certificate_of(runs[1])]).doubts
    assert doubt.text.startswith("no certificate for zero1: whether it is what one process computes")
    assert "scripts/verify.py -m strategy=zero1, with" in doubt.text


@pytest.mark.parametrize("changed", [{"torch": "2.0"}, {"revision": "0000"}, {"source": "0000"}])
def test_a_certificate_of_other_code_does_not_count(changed: dict[str, str | None]) -> None:
    ddp = run("ddp")
    assert compare_runs([ddp], certificates=[certificate_of(ddp, "agrees", **changed)]).runs[0].verdict is None


@pytest.mark.parametrize("fact", ["revision", "source"])
def test_no_certificate_counts_for_code_that_nobody_knows(fact: str) -> None:
    unknown = record().environment.model_copy(update={fact: None})
    ddp = run("ddp", changes={"environment": unknown})
    assert compare_runs([ddp], certificates=[certificate_of(ddp)]).runs[0].verdict is None


SETTING: dict[str, Any] = {
    "model": {"net": {"size": 8}, "optimizer": {"lr": 1}},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1},
    "trainer": {"max_steps": 4, "clip_norm": 1.0},
    "data": {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 8, "seed": 1},
}


def subject(section: str = "trainer", /, ranks: int = 2, micro: int = 4, **changes: Any) -> str:
    """That of a run of SETTING but for changes of one section."""
    config = SETTING | {section: SETTING[section] | changes}
    batch = record().batch.model_copy(update={"micro": micro})
    return subject_of(record(config=config, world_size=ranks, batch=batch))


def test_a_certificate_holds_for_other_rates_lengths_and_samples() -> None:
    same = [
        subject("optimizer", lr=2, weight_decay=0.3),
        subject("model", optimizer={"lr": 2}),
        subject("trainer", max_steps=9),
        subject("data", seed=2, max_val_samples=8),
    ]
    assert set(same) == {subject()}


def test_a_certificate_holds_for_no_other_setting() -> None:
    others = [
        subject("model", net={"size": 9}),
        subject(ranks=4),
        subject(micro=8),
        subject("data", global_batch_size=32),
        subject("data", micro_batch_size=8),
        subject("data", sequence_length=16),
        subject("trainer", clip_norm=None),
        subject("optimizer", _target_="torch.optim.SGD"),
        subject("optimizer", amsgrad=True),
    ]
    assert len({subject(), *others}) == 1 + len(others)


def test_a_run_of_a_module_that_was_edited_since_is_not_certified() -> None:
    ddp = run("ddp")
    assert ddp.record is not None
    edited = ddp.record.environment.model_copy(update={"source": "edited"})
    again = run("ddp", changes={"environment": edited})
    assert [one.verdict for one in compare_runs([again], certificates=[certificate_of(ddp)]).runs] == [None]


@pytest.mark.parametrize("losses", [(4.0, 3.0, 4.3), (4.0, math.nan, math.nan)])
def test_a_run_whose_losses_differ_is_not_called_certified(losses: tuple[float, ...]) -> None:
    runs = [run("single"), run("ddp", losses=losses), run("zero1")]
    comparison = compare_runs(runs, certificates=[certificate_of(runs[1]), certificate_of(runs[2])])
    assert [one.verdict for one in comparison.runs] == [None, "refuted", "agrees"]
    (doubt,) = comparison.doubts
    apart = "some are no numbers" if math.isnan(losses[2]) else "they differ by 2.3e+00 at step 30"
    assert doubt.text.startswith("ddp has a certificate, but its losses are not those")
    assert f"in the reference: {apart}, beyond rounding" in doubt.text
    text = " ".join(conclusions(comparison))
    assert "Certified, but refuted by their own losses: ddp" in text
    assert "Certified to compute what one process computes: zero1." in text


def test_a_certificate_holds_for_no_other_samples_optimizer_or_formats_that_were_found() -> None:
    samples = found().samples.model_copy(update={"shapes": [[16]]})
    sgd = found().optimizers[0].model_copy(update={"name": "torch.optim.sgd.SGD"})
    other = [found(samples=samples), found(optimizers=[sgd])]
    assert len({subject_of(record(found=one)) for one in [found(), found(trainable=5), *other]}) == 3


def test_what_contradicts_a_config_is_a_warning_of_the_comparison() -> None:
    noted = {"found": found(notes=["optimizer.lr=1 is not what runs."])}
    alone = run("single", changes={"found": found()})
    runs = [alone, run("ddp", changes=noted), run("fsdp", changes=noted)]
    told = [doubt.text for doubt in compare_runs(runs).doubts if doubt.fact == "config"]
    assert told == ["ddp, fsdp: optimizer.lr=1 is not what runs."]


def test_losses_that_were_to_differ_refute_no_certificate() -> None:
    other = run("ddp", losses=(4.0, 3.0, 2.5), config={"optimizer": {"lr": 0.2}})
    reseeded = run("ddp", losses=(4.0, 3.0, 2.5), seed=7)
    for one in (other, reseeded):
        assert compare_runs([run("single"), one], certificates=[certificate_of(one)]).runs[1].verdict == "agrees"


def test_a_certificate_beside_a_run_counts_if_it_is_of_the_same() -> None:
    ddp = run("ddp", ranks=2)
    certificate = certificate_of(ddp)
    candidate = run("candidate", ranks=2, verdict=certificate, changes={"strategy": "ddp"})
    comparison = compare_runs([ddp, run("zero1", ranks=2), candidate])
    assert {one.label: one.verdict for one in comparison.runs} == {
        "ddp": "agrees",
        "zero1": None,
        "candidate": "agrees",
    }


def test_ranks_that_share_a_cpu_are_warned_of() -> None:
    ddp = run("ddp", ranks=2)
    comparison = compare_runs([run("single"), ddp], certificates=[certificate_of(ddp)])
    assert [doubt.text for doubt in comparison.doubts] == [
        "ranks are processes that share 2 cores; their times say little of devices of their own."
    ]
    assert isinstance(record().environment, Environment)


def test_the_conclusions_say_who_waits() -> None:
    two: dict[str, Any] = {"ranks": 2, "found": measured()}
    assert "ddp waits 20% of a step for other ranks." in said(run("single"), run("ddp", **two))
    long = run("zero3", ranks=2, found=measured() | {"wait_share": [0.5, 0.7]})
    assert "zero3 waits longest for other ranks, 60% of a step; ddp shortest, 20%." in said(run("ddp", **two), long)


def test_each_repeat_has_its_own_difference_from_the_reference() -> None:
    repeats = [run("ddp", seed=1, losses=(4, 3, 2.5)), run("ddp", seed=2, losses=(4.25, 3, 2))]
    comparison = compare_runs([run("single"), *repeats])
    found = [(one.loss_difference, one.loss_difference_step) for one in comparison.runs]
    assert found == [(0.0, 10), (0.5, 30), (0.25, 10)]
    assert [one.curve.difference for one in comparison.runs[1:]] == [[0.0, 0.0, 0.5], [0.25, 0.0, 0.0]]
