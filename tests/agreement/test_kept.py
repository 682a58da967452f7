"""All that the state_dicts of a module and its optimizer hold goes on to the bit, or is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from launch.convert import convert_to
from strategies.checkpoint import Manifest, checkpoints, folder_of
from tests.agreement.cases import Case, own
from tests.agreement.free_cases import SAVED, same
from tests.agreement.training import job_of, train_case, train_rank
from tests.harness import run_ranks
from tests.tiers import in_tiers

KEPT = [
    own("counting_models.HasBuffers", strategy="ddp"),
    own("counting_models.HasBuffers", strategy="single", world_size=1),
    own("counting_models.Averages", strategy="zero2"),
    own("counting_models.Averages", strategy="zero3"),
    own("counting_models.Averages", strategy="fsdp"),
    own("counting_models.Averages", strategy="pipeline"),
    own("counting_models.Estimates", strategy="single", world_size=1),
    own("counting_models.Estimates", strategy="ddp"),
]


@pytest.mark.parametrize("case", in_tiers(KEPT, [KEPT[0], KEPT[4]]), ids=str)
def test_what_an_optimizer_counts_and_any_buffer_holds_goes_on_to_the_bit(case: Case, tmp_path: Path) -> None:
    whole = train_case([*case.overrides, f"checkpoint.every_steps={SAVED}"], tmp_path / "whole")
    after = train_case([*case.overrides, f"resume='{folder_of(tmp_path / 'whole', SAVED)}'"], tmp_path / "after")
    assert same(after, whole)
    (_, folder) = checkpoints(tmp_path / "whole")
    assert {group["k"] for group in Manifest.read(folder).groups} == {4}


@pytest.mark.full
def test_what_an_optimizer_counts_is_in_lightning_s_file_too(tmp_path: Path) -> None:
    words = own("counting_models.Averages", strategy="zero2").overrides
    train_case([*words, "checkpoint.at_end=true"], tmp_path / "run")
    job = job_of(words, tmp_path / "run")
    (tmp_path / "run" / "resolved.yaml").write_text(yaml.safe_dump(job.config.model_dump()))
    convert_to("lightning", tmp_path / "run", tmp_path / "w.ckpt", rename=[], shard_gib=None, trust=True)
    (state,) = torch.load(tmp_path / "w.ckpt", weights_only=True)["optimizer_states"]
    assert [(group["k"], group["seen"][0], float(group["pace"])) for group in state["param_groups"]] == [
        (4, 4, pytest.approx(0.9**8))
    ] * 2


def test_every_part_of_zero_3_s_groups_is_one_step_s(tmp_path: Path) -> None:
    """DeepSpeed calls the optimizer once for each of the groups: all of them would count as often."""
    single, zero3 = (
        train_case(own("counting_models.Averages", strategy=name, world_size=size).overrides, tmp_path / name)
        for name, size in (("single", 1), ("zero3", 2))
    )
    assert np.allclose(single.losses, zero3.losses, rtol=1e-5)


@pytest.mark.full
def test_weights_that_an_optimizer_moves_for_validation_are_gathered_anew(tmp_path: Path) -> None:
    single, fsdp = (
        train_case(
            [
                *own("counting_models.Moves", strategy=name, world_size=size).overrides,
                f"trainer.val_every_steps={SAVED}",
            ],
            tmp_path / name,
        )
        for name, size in (("single", 1), ("fsdp", 2))
    )
    assert np.allclose(single.losses, fsdp.losses, rtol=1e-5)
    assert np.allclose(single.val_losses[0], fsdp.val_losses[0], rtol=1e-5)


REFUSED = [
    (own("counting_models.Moves", strategy="zero2"), "strategy=zero2 steps copies of the weights, and Moving.eval"),
    (own("counting_models.Estimates", strategy="fsdp"), "Estimating looks at all of them at once"),
]


@pytest.mark.full
@pytest.mark.parametrize(("case", "told"), REFUSED, ids=str)
def test_what_would_be_another_algorithm_is_refused(case: Case, told: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="failed") as failed:
        train_case(case.overrides, tmp_path)
    assert f"{told}" in str(failed.value)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("KeepsLists", "Listing keeps list old for net.0.weight, and only tensors and numbers can be saved"),
        ("CountsInVectors", "Vectors changes Tensor rates in its param_groups"),
        ("HasSparse", "links is of sparse_coo, which no checkpoint holds"),
        ("HasExtra", "net.1.note is in the state_dict, but no parameter or buffer"),
    ],
)
def test_what_cannot_be_kept_is_told_by_the_first_step(name: str, told: str, tmp_path: Path) -> None:
    words = own(f"counting_models.{name}", strategy="single", world_size=1).overrides
    with pytest.raises(AssertionError, match="failed") as failed:
        train_case([*words, "checkpoint.every_steps=4"], tmp_path / "asked")
    assert f"ValueError: checkpoint: {told}" in str(failed.value)
    words = [word for word in words if word != "evidence=true"]
    job = job_of(words, tmp_path / "not-asked")
    run_ranks(1, job.run_dir, train_rank, job, None, None)
    assert f"No checkpoint is made: {told}" in (job.run_dir / "rank0.log").read_text()
    assert checkpoints(job.run_dir) == []
