"""The record tells what ran: what a test reads from the live objects by itself, and what the config says otherwise."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import Optimizer

from launch.worker import train
from tests.agreement.training import run_job
from tests.harness import run_ranks
from tests.tracking import foreign
from tests.tracking.foreign_jobs import job_of, train_rank
from tracking.certified import setting_of, subject_of
from tracking.contradictions import Expected, contradictions
from tracking.found import Found, RankFound, Samples, Stepping, Tensors, added, merged, took
from tracking.record import RunRecord


class Witness(pl.Callback):
    """Reads from the live objects what the record is to say, by code of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, Any] = {"batches": [], "groups": None}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen["batches"].append(len(batch[1]))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.seen["groups"] is None:
            parameters = list(pl_module.parameters())
            formats = Counter[str]()
            for parameter in parameters:
                formats[str(parameter.dtype)[6:]] += parameter.numel()
            self.seen |= {
                "optimizer": type(optimizer).__name__,
                "groups": [
                    {
                        "elements": sum(one.numel() for one in group["params"]),
                        "lr": group["lr"],
                        "weight_decay": group["weight_decay"],
                        "momentum": list(group["betas"]) if "betas" in group else group["momentum"],
                    }
                    for group in optimizer.param_groups
                ],
                "formats": formats,
                "gradients": sorted({str(one.grad.dtype)[6:] for one in parameters if one.grad is not None}),
                "trainable": sum(one.numel() for one in parameters if one.requires_grad),
                "frozen": sum(one.numel() for one in parameters if not one.requires_grad),
                "buffers": sum(buffer.numel() for buffer in pl_module.buffers()),
            }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.seen["state"] = sorted({str(one.dtype)[6:] for one in kept if isinstance(one, torch.Tensor) and one.ndim})
        self.path.write_text(json.dumps(self.seen))


def told(record: RunRecord) -> dict[str, Any]:
    """What the record says, in the witness's words."""
    found = record.found
    assert found is not None
    (optimizer,) = found.optimizers
    return {
        "batches": [found.micro_batch] * sum(found.samples.micro.values()),
        "optimizer": optimizer.name.rpartition(".")[2],
        "groups": [
            {
                "elements": group.parameters,
                "lr": group.settings["lr"],
                "weight_decay": group.settings["weight_decay"],
                "momentum": group.settings.get("betas", group.settings.get("momentum")),
            }
            for group in optimizer.groups
        ],
        "formats": found.parameters,
        "gradients": found.gradients,
        "trainable": found.trainable,
        "frozen": found.frozen,
        "buffers": found.buffers,
        "state": optimizer.state,
    }


MODULES = [
    foreign.OwnAdamW, foreign.TwoGroups, foreign.Bfloat16, foreign.MixedFormats, foreign.FrozenBase, foreign.Tied,
    foreign.Buffers, foreign.OwnSchedule, foreign.AsConfigured, foreign.OwnRate, foreign.Ignores,
]  # fmt: skip


def train_all(folder: Path) -> None:
    for kind in MODULES:
        own = folder / kind.__name__
        own.mkdir()
        train(job_of(kind, own), callbacks=[Witness(own / "witness.json")])
    used = folder / "used"
    used.mkdir()
    words = ["evidence=false", "trainer.max_steps=5", "trainer.val_every_steps=2", "optimizer.lr=0.5", "seed=2"]
    train(job_of(foreign.OwnAdamW, used, *words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all modules by one process, one after the other; its log is rank0.log."""
    folder = tmp_path_factory.mktemp("foreign")
    run_ranks(1, folder, train_all, folder)
    return folder


@pytest.mark.parametrize("kind", MODULES)
def test_the_record_is_what_the_live_objects_say(kind: type, trained: Path) -> None:
    folder = trained / kind.__name__
    assert told(RunRecord.read(folder / "record.json")) == json.loads((folder / "witness.json").read_text())


def test_a_certificate_speaks_for_a_run_that_was_not_made_to_be_compared(trained: Path) -> None:
    compared, used = (RunRecord.read(trained / name / "record.json") for name in ("OwnAdamW", "used"))
    assert setting_of(compared) == setting_of(used)
    assert subject_of(compared) == subject_of(used)
    assert compared.environment == used.environment
    assert setting_of(used)["sample_shapes"] == [[1, 8, 8], []]
    others = {subject_of(RunRecord.read(trained / kind.__name__ / "record.json")) for kind in MODULES}
    assert len(others) == len(MODULES)


def found_of(trained: Path, kind: type) -> Found:
    found = RunRecord.read(trained / kind.__name__ / "record.json").found
    assert found is not None
    return found


def test_the_record_says_whether_the_config_s_optimizer_was_made(trained: Path) -> None:
    asked = {kind: found_of(trained, kind).asked for kind in MODULES}
    assert [kind for kind, answer in asked.items() if answer] == [foreign.AsConfigured, foreign.OwnRate]
    assert [kind for kind, answer in asked.items() if answer is False] == [foreign.Ignores]


SGD_UNUSED = "optimizer=sgd optimizer.lr=0.77"


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        (foreign.AsConfigured, []),
        (foreign.OwnRate, ["optimizer.lr=0.77 is not what runs: OwnRate.configure_optimizers makes SGD with lr=0.033"]),
        (foreign.Ignores, [f"{SGD_UNUSED} optimizer.momentum=0.9 is not used: Ignores.configure_optimizers makes its"]),
        (foreign.OwnAdamW, [f"{SGD_UNUSED} optimizer.weight_decay=0.0 optimizer.momentum=0.9 is not used: OwnAdamW."]),
        (foreign.Bfloat16, [SGD_UNUSED, "has parameters in float32, but of Bfloat16's 1,754 elements are 1,754 in"]),
        (foreign.MixedFormats, [SGD_UNUSED, "but of MixedFormats's 1,210 elements are 1,040 in bfloat16"]),
    ],
)  # fmt: skip
def test_what_contradicts_the_config_is_told_at_the_start_and_stands_in_the_record(
    kind: type, notes: list[str], trained: Path
) -> None:
    found = found_of(trained, kind)
    assert len(found.notes) == len(notes)
    assert all(text in note for text, note in zip(notes, found.notes, strict=True))
    log = (trained / "rank0.log").read_text().splitlines()
    assert all(note in log for note in found.notes)


@pytest.mark.parametrize(
    ("kind", "formats"),
    [
        (foreign.OwnAdamW, ("float32",) * 4),
        (foreign.Bfloat16, ("bfloat16",) * 4),
        (foreign.MixedFormats, ("bfloat16 and float32",) * 4),
    ],
)
def test_the_formats_of_a_record_are_those_of_the_tensors(kind: type, formats: tuple[str, ...], trained: Path) -> None:
    precision = RunRecord.read(trained / kind.__name__ / "record.json").precision
    assert (precision.parameter, precision.compute, precision.reduce, precision.master) == formats


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=ddp", "launcher.devices=2"],
        pytest.param(["strategy=zero2", "launcher.devices=2"], marks=pytest.mark.full),
        pytest.param(["strategy=zero3", "launcher.devices=2"], marks=pytest.mark.full),
        pytest.param(["strategy=fsdp", "launcher.devices=2"], marks=pytest.mark.full),
        ["strategy=2d_pipeline", "strategy.micro_batches=2", "launcher.devices=4"],
        pytest.param(["strategy=ddp", "launcher.devices=2", "precision=bf16_master"], marks=pytest.mark.full),
    ],
    ids=lambda words: words[0] + (" bf16_master" if "precision=bf16_master" in words else ""),
)
def test_spread_over_ranks_the_record_is_that_of_the_whole(words: list[str], tmp_path: Path) -> None:
    job = job_of(foreign.TwoGroups, tmp_path, *words)
    run_job(job, train_rank, job)
    record = RunRecord.read(tmp_path / "record.json")
    found = record.found
    assert found is not None
    (optimizer,) = found.optimizers
    assert optimizer.name == "torch.optim.sgd.SGD"
    assert [(group.parameters, group.settings["lr"]) for group in optimizer.groups] == [(1584, 0.05), (170, 0.2)]
    assert [group.settings["weight_decay"] for group in optimizer.groups] == [1e-4, 0.0]
    stored = "bfloat16" if "precision=bf16_master" in words else "float32"
    assert (found.parameters, found.masters, optimizer.state) == ({stored: 1754}, ["float32"], ["float32"])
    assert (found.trainable, found.frozen, found.buffers) == (1754, 0, 0)
    assert (found.samples.micro, found.samples.step) == ({2: 6}, {8: 3})
    assert found.samples.shapes == [[1, 8, 8], []]
    assert len(found.notes) == 1
    assert not list(tmp_path.glob("ranks/*.found.json"))


def rank_of(number: int, steps: list[tuple[int, int]], **tensors: Tensors) -> RankFound:
    keys: dict[str, Any] = {"optimizers": [], "gradients": [], "micro": {4: 2}, "shapes": [], "buffers": {}}
    return RankFound(data_rank=number, parameters=tensors, steps=steps, **keys)


def test_samples_of_a_step_are_those_of_all_data_ranks_at_the_same_step() -> None:
    assert list(added([[(8, 3), (6, 1)], [(8, 2), (4, 2)]])) == [(16, 2), (12, 1), (10, 1)]
    steps: list[tuple[int, int]] = []
    for samples in (8, 8, 4, 8):
        took(steps, samples)
    assert steps == [(8, 2), (4, 1), (8, 1)]
    beside = [rank_of(0, [(8, 3)]), rank_of(0, [(8, 3)]), rank_of(1, [(8, 2), (4, 1)])]
    assert merged(beside, asked=None, notes=[]).samples.step == {16: 2, 12: 1}


def test_a_parameter_that_several_ranks_have_counts_once() -> None:
    shared = Tensors(6, True, "float32", "float32", (0, 0))
    frozen = Tensors(4, False, "bfloat16", "bfloat16", None)
    found = merged([rank_of(0, [], a=shared), rank_of(1, [], a=shared, b=frozen)], asked=None, notes=[])
    assert (found.trainable, found.frozen, found.parameters) == (6, 4, {"float32": 6, "bfloat16": 4})


def test_a_loader_s_own_batch_is_told() -> None:
    expected = Expected(
        optimizer={"_target_": "torch.optim.SGD"}, optimizer_choice="sgd", precision="fp32", parameter="float32",
        micro_batch=4, global_batch=16,
    )  # fmt: skip
    found = merged([rank_of(0, [(8, 1)])], asked=None, notes=[])
    (note,) = contradictions(found, expected, "Mine")
    assert note == "data.global_batch_size=16, but steps took 8 samples."
    larger = found.model_copy(update={"samples": Samples(micro={4: 3, 5: 1}, step={16: 1}, shapes=[])})
    (note,) = contradictions(larger, expected, "Mine")
    assert note.startswith("data.micro_batch_size=4, but the loader gives micro-batches of 4 and 5 samples")


def test_the_kind_of_optimizer_is_compared_and_not_its_name() -> None:
    expected = Expected(
        optimizer={"_target_": "torch.optim.Adam", "lr": 0.1, "betas": [0.9, 0.99]}, optimizer_choice="mine",
        precision="fp32", parameter="float32", micro_batch=4, global_batch=16,
    )  # fmt: skip
    live = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1, betas=(0.9, 0.99))
    made = Stepping(name=f"{type(live).__module__}.{type(live).__name__}", made_with=live.defaults, groups=[], state=[])
    found = merged([rank_of(0, [])], asked=None, notes=[]).model_copy(update={"optimizers": [made]})
    (note,) = contradictions(found, expected, "Mine")
    assert note.startswith("optimizer=mine optimizer.lr=0.1 is not used: Mine.configure_optimizers makes its own AdamW")
    same = made.model_copy(update={"name": "torch.optim.adam.Adam"})
    assert contradictions(found.model_copy(update={"optimizers": [same]}), expected, "Mine") == []
