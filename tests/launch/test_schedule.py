"""A run that goes on has its schedule where it was, to the bit; what cannot be had again is told at the start."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.optim import AdamW
from torch.optim import lr_scheduler as torchs

from launch.schedule import plain, restore_schedule
from scripts.convert import main
from strategies.checkpoint import Manifest, folder_of
from tests.agreement.cases import Case, own
from tests.agreement.free_cases import same
from tests.agreement.training import job_of, train_case
from tests.launch.scheduling import KINDS as KINDS_OF
from tests.launch.warm import train
from tests.tiers import in_tiers

SAVED = 2  # of four optimizer steps; every one is validated


def words_of(kind: str, **case: object) -> list[str]:
    made: Case = own("x", **{"strategy": "single", "world_size": 1, **case})
    named = [word for word in made.overrides if not word.startswith(("model._target_", "trainer.val_every"))]
    target = "model._target_=tests.launch.scheduling.Scheduled"
    return [*named, target, f"+model.kind='{kind}'", "trainer.val_every_steps=1"]


def resumed(words: list[str], folder: Path) -> tuple[Path, Path]:
    """Run folders of a run, and of one that goes on from its middle as that did, to the bit."""
    whole = train_case([*words, f"checkpoint.every_steps={SAVED}"], folder / "whole")
    middle = folder_of(folder / "whole", SAVED)
    after = train_case([*words, f"resume='{middle}'", "checkpoint.at_end=true"], folder / "after")
    assert same(after, whole)
    return folder / "whole", folder / "after"


def states(run_dir: Path) -> list[dict]:
    return Manifest.read(folder_of(run_dir, 4)).schedulers


KEPT = ["sequential", "chained", "nested", "one cycle", "cyclic", "exponential", "several", "multiplied", "own"]


@pytest.mark.parametrize("kind", in_tiers([*KEPT, "plateau"], ["sequential", "plateau"]))
def test_schedule_goes_on_as_if_nothing_had_been(kind: str, tmp_path: Path) -> None:
    whole, after = resumed(words_of(kind), tmp_path)
    assert states(after) == states(whole)


@pytest.mark.full
@pytest.mark.parametrize("every", [1, 2, 3])
def test_plateau_goes_on_behind_a_validation_and_elsewhere(every: int, tmp_path: Path) -> None:
    words = [*words_of("plateau", accumulation=2, strategy="ddp", world_size=2), f"trainer.val_every_steps={every}"]
    whole, after = resumed(words, tmp_path)
    assert states(after) == states(whole)
    assert (states(whole)[0]["last_epoch"], states(whole)[0]["_last_lr"][0] < 0.003) == (3 // every, every == 1)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_momenta_go_on_where_ranks_share_a_model(strategy: str, tmp_path: Path) -> None:
    resumed(words_of("one cycle", strategy=strategy, world_size=2), tmp_path)


REFUSED = {
    "tensor": ("Scheduled", "restless", "Restless.mean is Tensor, and of a schedule only numbers"),
    "loss of each step": ("PlateauOfTraining", "plateau", "ReduceLROnPlateau looks at loss every 1 batches"),
    "module's own": ("Counts", None, "Counting.get_extra_state of net.4 is not called"),
}


@pytest.mark.parametrize(("model", "kind", "told"), in_tiers([*REFUSED.values()], [REFUSED["tensor"]]), ids=REFUSED)
def test_what_could_not_be_had_again_is_told_at_the_start(
    model: str, kind: str | None, told: str, tmp_path: Path
) -> None:
    words = [word for word in words_of("") if "model." not in word and "evidence" not in word]
    words += [f"model._target_=tests.launch.scheduling.{model}", *([f"+model.kind={kind}"] if kind else [])]
    run = train(tmp_path, *words, "checkpoint.every_steps=2", "run_dir=asked")
    assert run.returncode != 0
    assert f"checkpoint: {told}" in run.stderr
    assert "Traceback" not in run.stderr
    if told != REFUSED["tensor"][-1]:
        return  # what becomes of a run that was not asked for checkpoints is the same for all
    run = train(tmp_path, *words, "run_dir=unasked")
    assert run.returncode == 0, run.stderr
    assert f"No checkpoint is made: {told}" in run.stdout


def test_lightning_has_the_schedules_that_one_is_made_of_and_the_momenta(tmp_path: Path) -> None:
    for kind in ("nested", "one cycle"):
        words = words_of(kind)
        folder, out = tmp_path / kind, tmp_path / f"{kind}.ckpt"
        train_case([*words, "checkpoint.at_end=true"], folder)
        (folder / "resolved.yaml").write_text(yaml.safe_dump(job_of(words, folder).config.model_dump()))
        assert main([str(folder), "--to", "lightning", str(out), "--trust"]) == 0
        tree = torch.load(out, weights_only=True)
        (kept,), (groups,) = states(folder), [tree["optimizer_states"][0]["param_groups"]]
        (state,) = tree["lr_schedulers"]
        assert [group["lr"] for group in groups] == kept["_last_lr"] == state["_last_lr"]
        assert [part["last_epoch"] for part in state.get("_schedulers", [])] == [
            part["last_epoch"] for part in kept.get("_schedulers", [])
        ]
        assert [list(group["betas"]) for group in groups] == [
            moved["betas"] for moved in kept.get("momenta", [{"betas": [0.9, 0.999]}] * 2)
        ]


def scheduled(kind: str, steps: int, lr: float = 0.003, groups: int = 2) -> torchs.LRScheduler:
    parameters = [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(groups)]
    scheduler = KINDS_OF[kind](AdamW(parameters, lr=lr))
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
    return scheduler


def rates(scheduler: torchs.LRScheduler) -> list[float]:
    return [group["lr"] for group in scheduler.optimizer.param_groups]


@pytest.mark.parametrize("groups", [1, 2])
def test_rate_of_the_config_at_hand_holds(groups: int) -> None:
    """Also where a rank has fewer groups than the one that spoke for all."""
    scheduler = scheduled("nested", 0, lr=0.006, groups=groups)
    restore_schedule(scheduler, json.loads(json.dumps(plain(scheduled("nested", 2)))))
    assert rates(scheduler) == pytest.approx([2 * rate for rate in rates(scheduled("nested", 2))[:groups]])
    for _ in range(9):
        scheduler.optimizer.step()
        scheduler.step()
    assert rates(scheduler) == pytest.approx([2 * rate for rate in rates(scheduled("nested", 11))[:groups]])


def test_momenta_of_fewer_groups_are_put_back_where_all_were_moved_alike() -> None:
    before, scheduler = scheduled("one cycle", 3), scheduled("one cycle", 0, groups=1)
    state = json.loads(json.dumps(plain(before)))
    restore_schedule(scheduler, state)
    assert scheduler.optimizer.param_groups[0]["betas"] == before.optimizer.param_groups[0]["betas"]
    state["momenta"][1]["betas"][0] = 0.5
    with pytest.raises(ValueError, match="OneCycleLR moved the 2 groups"):
        restore_schedule(scheduler, state)


@pytest.mark.parametrize("kind", ["one cycle", "exponential", "cyclic"])
def test_checkpoint_that_knew_of_no_momenta_leaves_them(kind: str) -> None:
    before, scheduler = scheduled(kind, 3), scheduled(kind, 0)
    betas = scheduler.optimizer.param_groups[0]["betas"]
    state = {key: value for key, value in plain(before).items() if key != "momenta"}
    restore_schedule(scheduler, state)
    assert rates(scheduler) == rates(before)
    assert scheduler.optimizer.param_groups[0]["betas"] == betas


@pytest.mark.parametrize(
    ("left_out", "kind", "told"),
    [
        ("_schedulers", "sequential", "SequentialLR is made of 2 schedules, and the checkpoint has the state of 0"),
        ("base_lrs", "plateau", "of ReduceLROnPlateau no base rates were kept"),
    ],
)
def test_checkpoint_that_was_never_whole_is_told(left_out: str, kind: str, told: str) -> None:
    state = {key: value for key, value in plain(scheduled(kind, 0)).items() if key != left_out}
    with pytest.raises(ValueError, match=told):
        restore_schedule(scheduled(kind, 0), state)
