"""Which samples are in an optimizer step, and which of them belong to a data rank: the one place that knows it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.refused import RefusedError

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

# SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with the
# constants of Vigna's reference implementation (https://prng.di.unimi.it/splitmix64.c).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

# Four rounds make a pseudorandom permutation of a large domain (Luby and Rackoff, 1988); the tiny domains of tests
# and toy corpora need more to look shuffled.
_ROUNDS = 8


def splitmix64(words: Words) -> Words:
    """Hash every 64-bit word to another one, bijectively: one step of SplitMix64 from the state `words`."""
    mixed = words + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIERS[1]
    return mixed ^ (mixed >> np.uint64(31))


def permute(positions: Indices, num_samples: int, *, seed: int, epoch: int) -> Indices:
    """Shuffled sample indices at `positions` of one epoch, all in [0, num_samples), without storing the permutation.

    A Feistel network over the smallest power of two that holds `num_samples`; what falls outside is encrypted again
    until it is inside (cycle walking), which keeps it a bijection: Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002. Only integer arithmetic modulo 2**64: the same on every machine and in every version.
    """
    num_bits = max(2, (num_samples - 1).bit_length())
    keys = _round_keys(seed, epoch)
    shuffled = _encrypt(positions.astype(np.uint64), num_bits, keys)
    while (outside := shuffled >= num_samples).any():
        shuffled[outside] = _encrypt(shuffled[outside], num_bits, keys)
    return shuffled.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> Words:
    """One odd multiplier and one addend per round [2, rounds]."""
    of_seed = splitmix64(np.full(2 * _ROUNDS, seed, dtype=np.uint64))
    of_epoch = splitmix64(of_seed ^ np.uint64(epoch))
    keys = splitmix64(of_epoch ^ np.arange(2 * _ROUNDS, dtype=np.uint64)).reshape(2, _ROUNDS)
    keys[0] |= np.uint64(1)
    return keys


def _encrypt(words: Words, num_bits: int, keys: Words) -> Words:
    """Bijection of [0, 2**num_bits): each round changes one half by a function of the other, so each can be undone.

    That function is multiply-add-shift: Dietzfelbinger, "Universal hashing and k-wise independent random variables
    via integer arithmetic without primes", STACS 1996.
    """
    low_bits, high_bits = num_bits // 2, num_bits - num_bits // 2
    low, high = words & np.uint64((1 << low_bits) - 1), words >> np.uint64(low_bits)
    to_low, to_high = np.uint64(64 - low_bits), np.uint64(64 - high_bits)
    multipliers, addends = keys
    for even in range(0, _ROUNDS, 2):
        odd = even + 1
        high = high ^ ((low * multipliers[even] + addends[even]) >> to_high)
        low = low ^ ((high * multipliers[odd] + addends[odd]) >> to_low)
    return (high << np.uint64(low_bits)) | low


class Stream(ABC):
    """Endless samples, epoch after epoch, cut into global batches.

    Optimizer step `s` takes positions [s * global_batch_size, (s + 1) * global_batch_size), across the end of an epoch
    if need be.
    """

    global_batch_size: int

    @property
    @abstractmethod
    def described(self) -> str:
        """What the order of samples is, in a few words."""

    @abstractmethod
    def indices(self, first: int, count: int) -> Indices:
        """Sample indices at the positions [first, first + count)."""

    @abstractmethod
    def epochs_before(self, position: int) -> int:
        """How many epochs are over when the sample before `position` has been taken."""

    def step_indices(self, step: int) -> Indices:
        """Sample indices of an optimizer step [global_batch_size]."""
        return self.indices(step * self.global_batch_size, self.global_batch_size)

    def first(self, step: int, micro: int, *, micro_batch_size: int, data_rank: int, data_ranks: int) -> int:
        """Position of the first of the samples of one forward of one data rank; the others follow it."""
        first = (micro * data_ranks + data_rank) * micro_batch_size
        assert first + micro_batch_size <= self.global_batch_size, "a micro-batch beyond the end of its step"
        return step * self.global_batch_size + first

    def micro_batch(self, step: int, micro: int, *, micro_batch_size: int, data_rank: int, data_ranks: int) -> Indices:
        """Sample indices [micro_batch_size] of one forward of one data rank.

        Over all ranks and micro-batches of a step these are exactly `step_indices(step)`, however they are divided.
        """
        place = {"micro_batch_size": micro_batch_size, "data_rank": data_rank, "data_ranks": data_ranks}
        return self.indices(self.first(step, micro, **place), micro_batch_size)

    def epochs_ended(self, step: int) -> int:
        """How many epochs have ended with the optimizer steps before `step`."""
        return self.epochs_before(step * self.global_batch_size)


@dataclass(frozen=True, kw_only=True)
class Order(Stream):
    """Shuffled epochs: position `p` is sample `permute(p mod num_samples)` of epoch `p div num_samples`.

    Not shuffled, it is sample `p mod num_samples`.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    shuffles: bool = True

    @property
    def described(self) -> str:
        return "shuffled" if self.shuffles else "in order"

    def epochs_before(self, position: int) -> int:
        return position // self.num_samples

    def indices(self, first: int, count: int) -> Indices:
        positions = np.arange(first, first + count, dtype=np.int64)
        if not self.shuffles:
            return positions % self.num_samples
        epochs = positions // self.num_samples
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            of_epoch = epochs == epoch
            indices[of_epoch] = permute(
                positions[of_epoch] % self.num_samples, self.num_samples, seed=self.seed, epoch=epoch
            )
        return indices


def evenly_spaced(num_samples: int, limit: int | None) -> Indices:
    """Indices [min(num_samples, limit)] of a subset spread evenly over all samples; all of them without a limit."""
    count = num_samples if limit is None else min(num_samples, limit)
    return np.arange(count, dtype=np.int64) * num_samples // count


def evaluation_batches(num_samples: int, micro_batch_size: int, data_rank: int, data_ranks: int) -> list[Indices]:
    """Batches of one data rank, every sample in exactly one batch of one rank.

    Every rank gets the same number of batches and none is empty, for a strategy that communicates in the forward
    would wait for ever for a rank that has nothing to do. Sizes differ by at most one; they exceed `micro_batch_size`,
    by one, only where ranks could not be given the same number otherwise.

    Raises:
        ValueError: there are fewer samples than ranks.
    """
    if num_samples < data_ranks:
        raise RefusedError(
            f"The validation split has {num_samples} samples for {data_ranks} data ranks; raise data.max_val_samples "
            f"or data.val_fraction, give more data, or use at most {num_samples} data ranks."
        )
    wanted = -(-num_samples // (data_ranks * micro_batch_size))
    num_batches = max(1, min(wanted, num_samples // data_ranks))
    parts = np.array_split(np.arange(num_samples, dtype=np.int64), num_batches * data_ranks)
    return parts[data_rank::data_ranks]
