"""callbacks=ema: the same moving average under every engine, which any other goes on with."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from safetensors.numpy import load_file
from torch.optim.swa_utils import get_ema_avg_fn

from launch.convert import convert_to
from strategies.checkpoint import AVERAGE, Manifest, checkpoints, folder_of
from strategies.engines.checkpoint import Reader
from strategies.engines.formats import read_whole
from strategies.weights import averages_of
from tests.agreement.cases import Case, own
from tests.agreement.free_cases import FREE
from tests.agreement.training import train_case
from tests.tiers import in_tiers

DECAY = 0.8
AVERAGED = ["callbacks=ema", f"callbacks.ema.decay={DECAY}", "scheduler=constant", "scheduler.warmup_steps=0"]
LEG = 2  # steps that each strategy of a chain trains

# Each strategy goes on from the one before; every family of engines begins a chain, or stands behind another.
CHAINS = ["fsdp-zero2-pipeline-ddp", "ddp-zero3-tensor-zero1", "3d-zero3_offload-pipeline-single"]


class Averages(pl.Callback):
    """Averages as torch does for Lightning's EMAWeightAveraging, in one process that has all weights whole."""

    def __init__(self) -> None:
        self.averages: dict[str, Any] = {}
        self.step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step, average = trainer.global_step, get_ema_avg_fn(DECAY)
        for fqn, weight in pl_module.named_parameters():
            now = weight.detach().double()
            before = self.averages.get(fqn)
            self.averages[fqn] = now.clone() if before is None else average(before, now, self.step)
        if self.step % LEG == 0:
            arrays = {fqn: value.numpy() for fqn, value in self.averages.items()}
            np.savez(Path(trainer.default_root_dir) / f"averages{self.step}.npz", **arrays)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process's averages."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train_case([*FREE["single"].overrides, *AVERAGED[2:], f"trainer.max_steps={4 * LEG}"], folder, Averages)
    return folder


def averages_in(folder: Path) -> dict[str, np.ndarray]:
    """Of a checkpoint."""
    source = averages_of(folder)
    with Reader(*source) as reader:
        return {name.removeprefix("weight/"): read_whole(reader, name).numpy() for name in source.manifest.tensors}


def weights_in(folder: Path) -> dict[str, np.ndarray]:
    manifest = Manifest.read(folder)
    with Reader(folder, manifest) as reader:
        weights = [name for name in manifest.tensors if name.startswith("weight/")]
        return {name.removeprefix("weight/"): read_whole(reader, name).numpy() for name in weights}


def distance(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """The largest relative difference of two models' tensors, by their norms."""
    assert some.keys() == others.keys()
    return max(float(np.linalg.norm(some[name] - others[name]) / np.linalg.norm(others[name])) for name in some)


@pytest.mark.parametrize("chain", in_tiers(CHAINS, CHAINS[:1]))
def test_the_average_is_that_of_one_process_and_any_strategy_goes_on_with_it(
    chain: str, one_process: Path, tmp_path: Path
) -> None:
    before: list[str] = []
    for leg, strategy in enumerate(chain.split("-"), start=1):
        folder, step = tmp_path / f"{leg}", leg * LEG
        words = [*FREE[strategy].overrides, *AVERAGED, f"trainer.max_steps={step}", f"checkpoint.every_steps={step}"]
        train_case([*words, *before], folder)
        saved = folder_of(folder, step)
        truth = dict(np.load(one_process / f"averages{step}.npz"))
        assert distance(averages_in(saved), truth) < 1e-4
        assert distance(weights_in(saved), truth) > 1e-2  # what it would be if it forgot
        before = [f"resume='{saved}'"]


SAME = [
    own("FrozenStem", strategy="zero2"),
    Case(strategy="zero3", precision="bf16_master"),
    FREE["pipeline"],
]


@pytest.mark.full
@pytest.mark.parametrize("case", SAME, ids=str)
def test_the_same_strategy_goes_on_to_the_bit(case: Case, tmp_path: Path) -> None:
    words = [*case.overrides, *AVERAGED[:2], "checkpoint.every_steps=2"]
    train_case(words, tmp_path / "whole")
    train_case([*words, f"resume='{folder_of(tmp_path / 'whole', 2)}'"], tmp_path / "after")
    whole, after = (averages_in(folder_of(tmp_path / name, case.steps)) for name in ("whole", "after"))
    assert whole.keys() == after.keys()
    assert all(np.array_equal(whole[name], after[name]) for name in whole)


@pytest.mark.full
def test_an_average_may_begin_and_end_on_the_way(tmp_path: Path) -> None:
    """Of an optimizer that keeps nothing of its own, too."""
    for optimizer in (["optimizer=sgd"], []):
        words = [*FREE["ddp"].overrides, *optimizer, "trainer.max_steps=4"]
        bare, begun, ended = (tmp_path / f"{name}{len(optimizer)}" for name in ("bare", "begun", "ended"))
        train_case([*words, "checkpoint.every_steps=2", "trainer.max_steps=2"], bare)
        go_on = f"resume='{folder_of(bare, 2)}'"
        train_case([*words, *AVERAGED[:2], go_on, "checkpoint.every_steps=1", "checkpoint.keep_last=9"], begun)
        first, second = (weights_in(folder_of(folder, step)) for folder, step in ((bare, 2), (begun, 3)))
        average = {name: DECAY * first[name] + (1 - DECAY) * second[name] for name in first}
        assert distance(averages_in(folder_of(begun, 3)), average) < 1e-6
        train_case([*words, f"resume='{folder_of(begun, 3)}'", "checkpoint.every_steps=4"], ended)
        assert not [name for name in Manifest.read(folder_of(ended, 4)).tensors if AVERAGE in name]
        assert "no EMA; what the checkpoint has of it is dropped." in (ended / "rank0.log").read_text()


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_what_is_reached_late_is_averaged_with_what_it_was(strategy: str, tmp_path: Path) -> None:
    finds = ["strategy.find_unused_parameters=true"] if strategy == "ddp" else []
    case = own("trainer_models.LateLayer", strategy=strategy, world_size=1 + (strategy == "ddp"))
    train_case([*case.overrides, *finds, *AVERAGED[:2], "checkpoint.every_steps=4"], tmp_path, Averages)
    assert distance(averages_in(folder_of(tmp_path, 4)), dict(np.load(tmp_path / "averages4.npz"))) < 1e-6


@pytest.mark.full
def test_bfloat16_weights_have_a_float32_average(tmp_path: Path) -> None:
    case = Case(strategy="ddp", precision="bf16_pure")
    train_case([*case.overrides, *AVERAGED[:2], "checkpoint.every_steps=4"], tmp_path)
    (saved,) = checkpoints(tmp_path)
    tensors = Manifest.read(saved).tensors
    kinds = {name.split("/")[1]: one.dtype for name, one in tensors.items() if name.startswith("state/")}
    assert kinds[AVERAGE] == "float32"


def test_the_average_is_written_for_others(one_process: Path, tmp_path: Path) -> None:
    words = [*FREE["single"].overrides, *AVERAGED, f"trainer.max_steps={LEG}", f"checkpoint.every_steps={LEG}"]
    train_case(words, tmp_path / "run")
    averaged = partial(convert_to, shard_gib=None, rename=[], trust=False, average=True)
    averaged("safetensors", tmp_path / "run", tmp_path / "ema.safetensors")
    assert distance(load_file(tmp_path / "ema.safetensors"), dict(np.load(one_process / f"averages{LEG}.npz"))) < 1e-6
    with pytest.raises(ValueError, match="use --to safetensors"):
        averaged("lightning", tmp_path / "run", tmp_path / "ema.ckpt")
