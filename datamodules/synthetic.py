"""Random tokens of any shape, for benchmarks: nothing to read, nothing to store."""

from dataclasses import dataclass as plain_dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from datamodules.order import Indices, splitmix64
from datamodules.spec import FORBID_EXTRA, SampledData


@plain_dataclass(frozen=True, kw_only=True)
class HashedSamples:
    """Samples whose tokens are hashes of (seed, index of the sample, position); `first` is the index of sample 0."""

    seed: int
    first: int
    num_samples: int
    sequence_length: int
    vocab_size: int

    def __len__(self) -> int:
        return self.num_samples

    def batch(self, indices: Indices) -> tuple[NDArray[np.int64]]:
        """Token ids [batch, sequence_length + 1], uniform over the vocabulary."""
        of_seed = splitmix64(np.full(len(indices), self.seed, dtype=np.uint64))
        of_sample = splitmix64(of_seed ^ (indices + self.first).astype(np.uint64))
        positions = np.arange(self.sequence_length + 1, dtype=np.uint64)
        return ((splitmix64(of_sample[:, None] ^ positions) % np.uint64(self.vocab_size)).astype(np.int64),)


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class SyntheticData(SampledData):
    """Settings of random tokens: `num_samples` to train on, and as many others to validate on."""

    vocab_size: PositiveInt
    sequence_length: PositiveInt
    num_samples: PositiveInt

    @property
    def tokens_per_sample(self) -> int:
        return self.sequence_length

    def prepare(self) -> None:
        """Nothing: a sample is computed when it is asked for."""

    def train_samples(self) -> HashedSamples:
        return self._samples(first=0)

    def val_samples(self) -> HashedSamples:
        return self._samples(first=self.num_samples)

    def _samples(self, first: int) -> HashedSamples:
        return HashedSamples(
            seed=self.seed,
            first=first,
            num_samples=self.num_samples,
            sequence_length=self.sequence_length,
            vocab_size=self.vocab_size,
        )
