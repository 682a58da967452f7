"""Synthetic tokens: nothing stored, and yet the same sample whenever it is asked for."""

from typing import Any

import numpy as np

from datamodules.synthetic import SyntheticData


def synthetic_data(**settings: Any) -> SyntheticData:
    defaults: dict[str, Any] = {
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "seed": 0,
        "vocab_size": 100,
        "sequence_length": 15,
        "num_samples": 50,
    }
    return SyntheticData(**(defaults | settings))


def test_a_sample_depends_on_its_seed_and_index_alone() -> None:
    samples = synthetic_data().train_samples()
    (batch,) = samples.batch(np.array([7, 3, 7]))
    assert batch.shape == (3, 16)
    assert batch.dtype == np.int64
    assert np.array_equal(batch[0], batch[2])
    longer = synthetic_data(sequence_length=31, num_samples=9).train_samples()
    assert np.array_equal(longer.batch(np.array([3]))[0][0, :16], batch[1])
    assert not np.array_equal(synthetic_data(seed=1).train_samples().batch(np.array([7]))[0][0], batch[0])


def test_no_two_samples_are_alike_in_either_split() -> None:
    data = synthetic_data()
    data.prepare()
    batches = [samples.batch(np.arange(len(samples)))[0] for samples in (data.train_samples(), data.val_samples())]
    assert len({tuple(row) for row in np.concatenate(batches)}) == 100


def test_tokens_are_uniform_over_the_vocabulary() -> None:
    (batch,) = synthetic_data(sequence_length=999, num_samples=100).train_samples().batch(np.arange(100))
    counts = np.bincount(batch.ravel(), minlength=100)
    # 1000 of each, with a standard deviation of 32.
    assert len(counts) == 100
    assert np.abs(counts - 1000).max() < 160
