"""Loading: a Lightning Trainer sees the samples that the order says, each where it belongs."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from datamodules.images import ImageData
from datamodules.order import Order
from datamodules.spec import Data, SampledData
from datamodules.synthetic import SyntheticData
from datamodules.text import TextData
from datamodules.tokenizers import vocab_size
from tests.datamodules.slicing import GLOBAL_BATCH, MICRO_BATCH, QUIET, Recorder, trainer_for

ROOT = Path(__file__).parents[2]
pytestmark = QUIET


def synthetic_data(**settings: Any) -> SyntheticData:
    defaults: dict[str, Any] = {
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": MICRO_BATCH,
        "seed": 3,
        "vocab_size": 1000,
        "sequence_length": 4,
        "num_samples": 21,
        "max_val_samples": 13,
    }
    return SyntheticData(**(defaults | settings))


def fit(data: Data, *, data_rank: int = 0, data_ranks: int = 1) -> Recorder:
    recorder, trainer = Recorder(), trainer_for(data_rank=data_rank, data_ranks=data_ranks)
    trainer.fit(recorder, datamodule=data.build())
    assert trainer.global_step == 5
    return recorder


def expected(data: SampledData, steps: range) -> np.ndarray:
    """The samples of optimizer steps as the order has them [steps, global batch, ...]."""
    samples = data.train_samples()
    order = Order(num_samples=len(samples), global_batch_size=data.global_batch_size, seed=data.seed)
    return np.stack([samples.batch(order.step_indices(step))[0] for step in steps])


@pytest.mark.parametrize(("data_ranks", "num_workers"), [(1, 0), (2, 0), (4, 0), (1, 1)])
def test_a_trainer_sees_every_step_as_the_order_has_it(data_ranks: int, num_workers: int) -> None:
    data = synthetic_data(num_workers=num_workers)
    ranks = [fit(data, data_rank=rank, data_ranks=data_ranks) for rank in range(data_ranks)]
    batches = [batch for together in zip(*(rank.trained for rank in ranks), strict=True) for batch in together]
    assert all(batch.shape == (MICRO_BATCH, 5) and batch.dtype == torch.int64 for batch in batches)
    assert np.array_equal(torch.cat(batches).numpy().reshape(5, GLOBAL_BATCH, 5), expected(data, range(5)))


@pytest.mark.parametrize(("data_ranks", "num_workers"), [(1, 0), (2, 0), (4, 0), (1, 1)])
def test_validation_samples_are_the_same_at_every_world_size(data_ranks: int, num_workers: int) -> None:
    data = synthetic_data(num_workers=num_workers)
    ranks = [fit(data, data_rank=rank, data_ranks=data_ranks).validated for rank in range(data_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = torch.cat([batch for batches in ranks for batch in batches]).numpy()
    (wanted,) = data.val_samples().batch(np.arange(13) * 21 // 13)
    assert sorted(map(tuple, seen)) == sorted(map(tuple, wanted))


def test_resume_goes_on_at_the_next_sample(tmp_path: Path) -> None:
    data = synthetic_data()
    first = trainer_for(max_steps=3)
    first.fit(Recorder(), datamodule=data.build())
    first.save_checkpoint(tmp_path / "last.ckpt")
    recorder, resumed = Recorder(), trainer_for(max_steps=5)
    resumed.fit(recorder, datamodule=data.build(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 5
    seen = torch.cat(recorder.trained).numpy().reshape(2, GLOBAL_BATCH, 5)
    assert np.array_equal(seen, expected(data, range(3, 5)))


def test_the_loader_knows_its_length() -> None:
    data, recorder, trainer = synthetic_data(), Recorder(), trainer_for(data_ranks=2)
    trainer.fit(recorder, datamodule=data.build())
    assert trainer.num_training_batches == len(recorder.trained) == 5 * 2


def test_an_accumulation_that_does_not_fit_the_batch_is_refused() -> None:
    trainer = trainer_for(data_ranks=2)
    with pytest.raises(
        ValueError, match=r"global_batch_size=16 is not data\.micro_batch_size=2 x 2 data ranks x .*=2;"
    ):
        trainer.fit(Recorder(), datamodule=synthetic_data(global_batch_size=16).build())


def test_several_arrays_come_as_as_many_tensors() -> None:
    data = ImageData(global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, seed=0, image_size=8, num_classes=10)
    images, labels = fit(data).trained[0]
    assert (images.shape, images.dtype) == ((MICRO_BATCH, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((MICRO_BATCH,), torch.int64)


def test_text_samples_reach_a_worker_process_by_path_not_by_value(tmp_path: Path) -> None:
    data = TextData(
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        seed=0,
        num_workers=1,
        max_val_samples=4,
        tokenizer="bytes",
        vocab_size=256,
        sequence_length=32,
        val_fraction=0.05,
        cache_dir=str(tmp_path),
    )
    pickled = pickle.dumps(data.train_samples())
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).batch(np.array([5]))[0], data.train_samples().batch(np.array([5]))[0])
    seen = torch.cat(fit(data).trained).numpy().reshape(5, GLOBAL_BATCH, 33)
    assert np.array_equal(seen, expected(data, range(5)))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/data").glob("*.yaml")))
def test_every_preset_says_what_it_does_and_describes_a_data_choice(name: str) -> None:
    text = (ROOT / "conf/data" / f"{name}.yaml").read_text()
    assert text.startswith("# Trains on ")
    section = OmegaConf.create(text)
    if "vocab_size" in section and "tokenizer" in section:
        section.vocab_size = vocab_size(section.tokenizer)
    missing = {"idx": {"folder": "x"}, "own": {"module": {"_target_": "no.such.module"}}}
    config = OmegaConf.merge({"seed": 1, "data": section}, {"data": missing.get(name, {})})
    data = instantiate(config.data, _convert_="all")
    assert isinstance(data, Data)
    assert isinstance(data, get_class(section._target_))


def test_settings_import_neither_torch_nor_what_only_a_worker_needs() -> None:
    heavy = ["torch", "lightning", "sklearn", "tokenizers", "tiktoken"]
    check = (
        "import sys, datamodules.text, datamodules.images, datamodules.synthetic, datamodules.own\n"
        "from datamodules.synthetic import SyntheticData\n"
        "SyntheticData(global_batch_size=1, micro_batch_size=1, seed=0, vocab_size=9, sequence_length=1, num_samples=9)"
        f".prepare()\nsys.exit(', '.join(name for name in {heavy} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
