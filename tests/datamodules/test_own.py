"""Data of the user's own: their loaders' samples in one stream, however ranks and micro-batches divide it."""

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from datamodules.order import permute
from datamodules.own import OwnData
from datamodules.own_loading import arrange, facts_of, order_of
from tests.datamodules.slicing import GLOBAL_BATCH, MICRO_BATCH, QUIET, Recorder, SliceStrategy, trainer_for
from tests.tiers import in_tiers

pytestmark = QUIET

NUM_SAMPLES, STEPS = 21, 5
Make = Callable[[], Any]


class Listed(Dataset[torch.Tensor]):
    """Samples that are their own numbers."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Drawing(Listed):
    """Samples that draw three numbers, as a transform does."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()])


class Streamed(IterableDataset[torch.Tensor]):
    """Numbers that can only be iterated."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(self.num_samples)


class Counting(Sampler[int]):
    """Its order depends on how often it was asked: nobody can say an epoch of it alone."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(7)

    def __iter__(self) -> Iterator[int]:
        yield from self.generator.permutation(NUM_SAMPLES).tolist()


class Pairs(Sampler[list[int]]):
    """Batches of neighbours, drawn anew for each epoch."""

    def __init__(self, size: int = MICRO_BATCH) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        for first in torch.randperm(NUM_SAMPLES // self.size).tolist():
            yield [self.size * first + offset for offset in range(self.size)]


class Mine(LightningDataModule):
    """A user's module, of loaders that a test makes."""

    def __init__(self, train: Make, val: Make | None = None) -> None:
        super().__init__()
        self.make_train, self.make_val = train, val or (lambda: DataLoader(Listed(4)))
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.called.append("setup" if stage == "fit" else "?")

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return self.make_train()

    def val_dataloader(self) -> Any:
        return self.make_val()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called.append("on_after_batch_transfer")
        return batch

    def teardown(self, stage: str) -> None:
        self.called.append("teardown" if stage == "fit" else "?")


def own_data(**settings: Any) -> OwnData:
    sizes = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH, "seed": 3}
    return OwnData(**{"module": {"_target_": "no.matter"}, **sizes, **settings})


def fit(make: Make, *, rank: int = 0, ranks: int = 1, val: Make | None = None, **settings: Any) -> Recorder:
    recorder, trainer = Recorder(), trainer_for(data_rank=rank, data_ranks=ranks, max_steps=STEPS)
    trainer.fit(recorder, datamodule=arrange(Mine(make, val), own_data(**settings)))
    assert trainer.global_step == STEPS
    return recorder


def stream(make: Make, *, ranks: int = 1, **settings: Any) -> np.ndarray:
    """The samples of each optimizer step, in the order of the global batch [steps, global batch, ...]."""
    seen = [fit(make, rank=rank, ranks=ranks, **settings).trained for rank in range(ranks)]
    batches = [batch for together in zip(*seen, strict=True) for batch in together]
    assert {len(batch) for batch in batches} == {MICRO_BATCH}
    return torch.cat(batches).numpy().reshape(STEPS, GLOBAL_BATCH, *batches[0].shape[1:])


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(Listed(), **{"batch_size": MICRO_BATCH, **settings})


class OddLoader(DataLoader[Any]):
    """A class of a user's own, of which nobody knows how it is constructed."""

    def __init__(self, numbers: Listed, /, how_many: int, *, scale: int) -> None:
        super().__init__(numbers, how_many, True, collate_fn=lambda samples: scale * torch.stack(samples))


ORDERS: dict[str, Make] = {
    "shuffled": lambda: loader(shuffle=True),
    "in order": loader,
    "drop_last": lambda: loader(shuffle=True, drop_last=True),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0 + i % 3 for i in range(NUM_SAMPLES)], NUM_SAMPLES)),
    "a part": lambda: loader(sampler=SubsetRandomSampler(range(10))),
    "with replacement": lambda: loader(sampler=RandomSampler(Listed(), replacement=True)),
    "a generator of its own": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "counting": lambda: loader(sampler=Counting()),
    "batches": lambda: DataLoader(Listed(), batch_sampler=Pairs()),
    "batches of a sampler": lambda: DataLoader(
        Listed(), batch_sampler=BatchSampler(SequentialSampler(Listed()), MICRO_BATCH, drop_last=False)
    ),
    "split already": lambda: loader(sampler=DistributedSampler(Listed(), num_replicas=2, rank=0)),
    "another class": lambda: OddLoader(Listed(), MICRO_BATCH, scale=10),
    "pickled": lambda: loader(shuffle=True, num_workers=1),
}


EVERYDAY = ["shuffled", "weighted", "batches", "another class"]


@pytest.mark.parametrize("order", in_tiers(list(ORDERS), EVERYDAY))
def test_ranks_share_one_stream_that_goes_on_across_the_end_of_an_epoch(order: str) -> None:
    assert np.array_equal(stream(ORDERS[order], ranks=4), stream(ORDERS[order]))


def test_a_loader_that_shuffles_gives_every_sample_once_an_epoch_by_the_seed() -> None:
    expected = [permute(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=3, epoch=epoch) for epoch in range(2)]
    assert np.array_equal(stream(ORDERS["shuffled"]).ravel(), np.concatenate(expected)[: STEPS * GLOBAL_BATCH])
    assert np.array_equal(stream(ORDERS["another class"]) // 10, stream(ORDERS["shuffled"]))
    assert not np.array_equal(stream(ORDERS["shuffled"], seed=4), stream(ORDERS["shuffled"]))


def test_a_loader_that_does_not_shuffle_gives_its_samples_in_order() -> None:
    for order in ("in order", "batches of a sampler"):
        assert stream(ORDERS[order]).ravel().tolist() == [i % NUM_SAMPLES for i in range(STEPS * GLOBAL_BATCH)]


def test_a_sampler_of_the_users_own_is_asked_epoch_after_epoch() -> None:
    generator = np.random.default_rng(7)
    expected = np.concatenate([generator.permutation(NUM_SAMPLES) for _ in range(2)])
    assert np.array_equal(stream(ORDERS["counting"]).ravel(), expected[: STEPS * GLOBAL_BATCH])
    assert set(stream(ORDERS["a part"]).ravel()) == set(range(10))
    pairs = stream(ORDERS["batches"]).reshape(-1, 2)
    assert (pairs[:, 1] - pairs[:, 0] == 1).all()
    assert (pairs[:, 0] % 2 == 0).all()


def test_an_endless_sampler_of_a_data_set_without_a_length_is_not_waited_for() -> None:
    class Squares(Dataset[torch.Tensor]):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(index * index)

    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield 4

    assert set(stream(lambda: DataLoader(Squares(), batch_size=MICRO_BATCH, sampler=Endless())).ravel()) == {16}


@pytest.mark.parametrize("order", ["shuffled", "weighted", "counting"])
def test_a_run_that_goes_on_takes_the_next_sample(order: str, tmp_path: Path) -> None:
    whole, first = stream(ORDERS[order]), trainer_for(max_steps=3)
    first.fit(Recorder(), datamodule=arrange(Mine(ORDERS[order]), own_data()))
    first.save_checkpoint(tmp_path / "last.ckpt")
    recorder, resumed = Recorder(), trainer_for(max_steps=STEPS)
    resumed.fit(recorder, datamodule=arrange(Mine(ORDERS[order]), own_data()), ckpt_path=tmp_path / "last.ckpt")
    assert np.array_equal(torch.cat(recorder.trained).numpy().reshape(2, GLOBAL_BATCH), whole[3:])


def test_what_a_sample_draws_follows_from_its_place_alone() -> None:
    def drawing(**settings: Any) -> Make:
        return lambda: DataLoader(Drawing(), batch_size=MICRO_BATCH, shuffle=True, **settings)

    alone = stream(drawing())
    assert len(np.unique(alone[..., 1:])) == 3 * STEPS * GLOBAL_BATCH
    assert np.array_equal(stream(drawing(), ranks=2), alone)
    assert np.array_equal(stream(drawing(num_workers=1)), alone)
    subset = stream(lambda: DataLoader(Subset(Drawing(), range(NUM_SAMPLES)), batch_size=MICRO_BATCH, shuffle=True))
    assert np.array_equal(subset, alone)


def test_reading_moves_no_generator_that_training_draws_from() -> None:
    def after(make: Make) -> float:
        torch.manual_seed(0)
        fit(make)
        return float(torch.rand(()))

    weighted = WeightedRandomSampler([1.0] * NUM_SAMPLES, NUM_SAMPLES)
    drawing = DataLoader(Drawing(), batch_size=MICRO_BATCH, sampler=weighted)
    assert after(lambda: drawing) == after(lambda: DataLoader(Listed(), batch_size=MICRO_BATCH))


def test_validation_sees_every_sample_once_whatever_the_ranks() -> None:
    def val() -> DataLoader[Any]:
        return DataLoader(Listed(13), batch_size=3, shuffle=True, drop_last=True)

    for ranks in (1, 4):
        seen = [fit(ORDERS["shuffled"], val=val, rank=rank, ranks=ranks).validated for rank in range(ranks)]
        assert len({len(batches) for batches in seen}) == 1
        assert sorted(torch.cat([batch for batches in seen for batch in batches]).tolist()) == list(range(13))
    some = fit(ORDERS["shuffled"], val=val, max_val_samples=4, val_batch_size=2).validated
    assert [batch.tolist() for batch in some] == [[0, 3], [6, 9]]


@pytest.mark.parametrize("several", [list, CombinedLoader], ids=["list", "CombinedLoader"])
def test_several_validation_loaders_are_each_seen_whole(several: Callable[..., Any]) -> None:
    def val() -> Any:
        loaders = [DataLoader(Listed(number), batch_size=2) for number in (4, 5)]
        return several(loaders, "sequential") if several is CombinedLoader else loaders

    seen = torch.cat(fit(ORDERS["shuffled"], val=val).validated).tolist()
    assert sorted(seen) == sorted([*range(4), *range(5)])


def test_the_modules_own_hooks_are_called() -> None:
    module, trainer = Mine(ORDERS["shuffled"]), trainer_for(max_steps=1)
    assert arrange(module, own_data()) is module
    trainer.fit(Recorder(), datamodule=module)
    assert module.called == ["prepare_data", "setup", *["on_after_batch_transfer"] * (4 + 4), "teardown"]


def test_what_was_found_out_about_the_data_is_told() -> None:
    def facts(make: Make) -> tuple[dict[str, Any], bool]:
        trainer = trainer_for(max_steps=1)
        trainer.fit(Recorder(), datamodule=arrange(Mine(make), own_data()))
        return facts_of(trainer), order_of(trainer) is None

    assert facts(ORDERS["shuffled"]) == ({"data.samples": NUM_SAMPLES, "data.order": "shuffled"}, False)
    assert facts(ORDERS["weighted"])[0]["data.order"] == "by WeightedRandomSampler"
    assert facts(lambda: DataLoader(Streamed(), batch_size=MICRO_BATCH)) == ({}, True)


def test_epochs_end_where_the_sampler_says() -> None:
    trainer = trainer_for(max_steps=STEPS)
    trainer.fit(Recorder(), datamodule=arrange(Mine(ORDERS["a part"]), own_data()))
    order = order_of(trainer)
    assert order is not None
    assert [order.epochs_ended(step) for step in range(6)] == [step * GLOBAL_BATCH // 10 for step in range(6)]


# --- what can only be iterated --------------------------------------------------------------------------------------


def test_an_iterable_data_set_is_read_again_and_again_with_no_batch_cut_short() -> None:
    expected = [i % NUM_SAMPLES for i in range(STEPS * GLOBAL_BATCH)]
    for workers in (0, 1):
        seen = stream(partial(DataLoader, Streamed(), batch_size=MICRO_BATCH, num_workers=workers))
        assert seen.ravel().tolist() == expected


def test_batches_that_the_data_make_by_themselves_are_taken_as_they_are() -> None:
    def loaded() -> Any:
        return DataLoader(IterablePairs(), batch_size=None)

    assert stream(IterablePairs).ravel().tolist()[:8] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert np.array_equal(stream(loaded), stream(IterablePairs))


class IterablePairs(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (torch.tensor([1, 2]), torch.tensor([3, 4]))


def test_a_data_set_that_splits_itself_is_read_as_it_is() -> None:
    make = lambda: DataLoader(Streamed(), batch_size=MICRO_BATCH)  # noqa: E731
    seen = fit(make, ranks=2, rank=1, splits_itself=True).trained
    assert torch.cat(seen).tolist() == [i % NUM_SAMPLES for i in range(STEPS * GLOBAL_BATCH // 2)]


def test_a_workers_own_start_sees_the_users_own_data_set() -> None:
    def begin(number: int) -> None:
        info = get_worker_info()
        assert info is not None
        info.dataset.num_samples = 3  # type: ignore[attr-defined]

    make = lambda: DataLoader(Streamed(), MICRO_BATCH, num_workers=1, worker_init_fn=begin)  # noqa: E731
    assert set(stream(make).ravel()) == {0, 1, 2}


# --- what is refused ------------------------------------------------------------------------------------------------


class Uneven(IterablePairs):
    """Its last batch is cut short."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (torch.tensor([1, 2]), torch.tensor([3]))


REFUSED: dict[str, tuple[Make, dict[str, Any], str]] = {
    "another batch size": (
        lambda: loader(batch_size=4),
        {},
        r"^data\.micro_batch_size=2, but the training loader of Mine has batch_size=4; set data\.micro_batch_size=4 "
        r".*, or give the loader batch_size=2\.$",
    ),
    "another batch size of an iterable": (lambda: DataLoader(Streamed(), batch_size=4), {}, r"has batch_size=4; set"),
    "another batch size than the one stated": (
        lambda: loader(batch_size=4),
        {"loader_batch_size": 3},
        r"^data\.loader_batch_size=3, but .* batch_size=4",
    ),
    "batches of other sizes": (
        lambda: DataLoader(Listed(), batch_sampler=Pairs(4)),
        {},
        r"^data\.module: Pairs gives a batch of 4 samples where others have 2; ",
    ),
    "a data set that makes batches": (
        lambda: loader(batch_size=None),
        {},
        r"Mine has batch_size=None, .* batch_size=2",
    ),
    "several loaders": (lambda: [loader(), loader()], {}, r"^data\.module: Mine\.train_dataloader\(\) gives several "),
    "several combined": (lambda: CombinedLoader({"a": loader()}), {}, r"gives several loaders"),
    "no samples": (lambda: DataLoader(Listed(0), MICRO_BATCH), {}, r"^data\.module: the training set has no samples"),
    "no samples to iterate": (lambda: DataLoader(Streamed(0), MICRO_BATCH), {}, r"Streamed gives nothing to train on"),
    "an empty sampler": (lambda: loader(sampler=[]), {}, r"^data\.module: list gives no sample in epoch 0"),
    "batches that cannot be cut anew": (
        IterablePairs,
        {"micro_batch_size": 4, "loader_batch_size": 2},
        r"^data\.micro_batch_size=4, but the training loader gives a batch of 2 samples; ",
    ),
    "batches of another size": (
        Uneven,
        {},
        r"^data\.micro_batch_size=2, but the training loader gives a batch of 1 samples; set data\.micro_batch_size=1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_loader_that_cannot_be_right_is_refused(case: str) -> None:
    make, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        fit(make, **settings)
    assert "\n" not in str(caught.value)


def test_a_loader_of_another_batch_size_is_cut_anew_where_that_is_stated() -> None:
    assert np.array_equal(stream(lambda: loader(batch_size=4), loader_batch_size=4), stream(loader))


def test_what_only_its_own_code_can_split_is_refused_on_several_ranks() -> None:
    with pytest.raises(ValueError, match=r"^data\.module: Streamed, of Mine's training, .* data\.splits_itself=true"):
        fit(lambda: DataLoader(Streamed(), batch_size=MICRO_BATCH), ranks=2)
    with pytest.raises(ValueError, match=r"^data\.module: Pairs, of Mine's training, .* all 2 data ranks"):
        fit(Pairs, ranks=2)
    with pytest.raises(ValueError, match=r"Streamed, of Mine's validation, .* all 2 data ranks would read the same"):
        fit(loader, val=lambda: DataLoader(Streamed()), ranks=2)


def test_ranks_that_would_read_different_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SliceStrategy, "broadcast", lambda self, told, src=0: told[::-1])
    with pytest.raises(ValueError, match=r"Mine\.train_dataloader\(\) gives rank 0 other samples, or another order"):
        fit(ORDERS["weighted"])


def test_a_module_is_built_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "users_package", sys.modules[__name__])
    data = OwnData(global_batch_size=8, micro_batch_size=2, tokens_per_sample=7, module={"_target_": "no.such.module"})
    data.prepare()
    assert data.tokens_per_sample == 7
    with pytest.raises(ValueError, match=r"^data\.module: .*no\.such\.module"):
        data.build()
    with pytest.raises(ValueError, match=r"data\.module has no _target_; give data\.module\._target_="):
        own_data(module={"value": 5})
    with pytest.raises(ValueError, match=r"^data\.module\._target_=users_package.Listed is not a LightningDataModule"):
        OwnData(global_batch_size=8, micro_batch_size=2, module={"_target_": "users_package.Listed"}).build()
    with pytest.raises(ValueError, match=r"Bare has no train_dataloader\(\); give it one\."):
        OwnData(global_batch_size=8, micro_batch_size=2, module={"_target_": "users_package.Bare"}).build()


class Bare(LightningDataModule):
    """A module that has forgotten its loader."""


def test_a_module_without_validation_trains() -> None:
    class Trains(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.arange(40)), batch_size=MICRO_BATCH)

    recorder, trainer = Recorder(), trainer_for()
    recorder.validation_step = None  # type: ignore[assignment]
    trainer.fit(recorder, datamodule=arrange(Trains(), own_data()))
    assert recorder.trained[0][0].tolist() == [0, 1]
    assert isinstance(trainer, Trainer)
