"""The order of samples: a bijection, fixed for all time, and the same however a step is divided."""

import numpy as np
import pytest

from datamodules.order import Order, evaluation_batches, evenly_spaced, permute, splitmix64

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 97, 1000, 7919, 10**6]


@pytest.mark.parametrize("num_samples", SIZES)
def test_a_permutation_holds_every_sample_once(num_samples: int) -> None:
    for epoch in (0, 1, 12345):
        shuffled = permute(np.arange(num_samples), num_samples, seed=3, epoch=epoch)
        assert np.array_equal(np.sort(shuffled), np.arange(num_samples))


def test_a_permutation_can_be_read_at_any_position_alone() -> None:
    whole = permute(np.arange(1000), 1000, seed=0, epoch=0)
    assert [int(permute(np.array([i]), 1000, seed=0, epoch=0)[0]) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


def test_a_permutation_shuffles() -> None:
    shuffled = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    # The correlation of independent uniform ranks has a standard deviation of 1/sqrt(n) = 0.003.
    assert abs(np.corrcoef(shuffled, np.arange(100_000))[0, 1]) < 0.015
    assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 0.015


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(permute(np.arange(100), 100, seed=seed, epoch=epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_over_many_epochs_each_sample_is_first_equally_often() -> None:
    firsts = [int(permute(np.array([0]), 10, seed=0, epoch=epoch)[0]) for epoch in range(5000)]
    # 500 each with a standard deviation of 21.
    assert np.abs(np.bincount(firsts, minlength=10) - 500).max() < 100


def test_splitmix64_gives_the_reference_sequence() -> None:
    # The first outputs of Vigna's reference code from state 0; its state advances by the golden gamma.
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [f"{word:016x}" for word in splitmix64(states)] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "06c45d188009454f",
    ]


def test_the_order_is_the_one_of_the_first_release() -> None:
    order = Order(num_samples=10, global_batch_size=8, seed=0)
    assert order.step_indices(0).tolist() == [7, 0, 6, 1, 3, 2, 5, 8]
    assert order.step_indices(1).tolist() == [9, 4, 4, 1, 9, 8, 6, 7]
    large = Order(num_samples=10**9 + 7, global_batch_size=4, seed=2**32 - 1)
    assert large.step_indices(10**6).tolist() == [112845911, 282742551, 970155897, 390768707]


def test_every_epoch_holds_every_sample_once_also_where_a_step_crosses_its_end() -> None:
    order = Order(num_samples=7, global_batch_size=4, seed=1)
    stream = np.concatenate([order.step_indices(step) for step in range(7)])
    for epoch in range(4):
        assert sorted(stream[epoch * 7 : epoch * 7 + 7]) == list(range(7))


def test_a_step_larger_than_the_data_goes_through_several_epochs() -> None:
    order = Order(num_samples=3, global_batch_size=8, seed=1)
    assert np.bincount(order.step_indices(0)).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


@pytest.mark.parametrize("data_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 2, 1000])
def test_a_step_has_the_same_samples_at_every_world_size(data_ranks: int, micro_batch_size: int, step: int) -> None:
    order = Order(num_samples=50, global_batch_size=32, seed=0)
    slices = [
        order.micro_batch(step, micro, micro_batch_size=micro_batch_size, data_rank=rank, data_ranks=data_ranks)
        for micro in range(32 // (micro_batch_size * data_ranks))
        for rank in range(data_ranks)
    ]
    assert all(len(indices) == micro_batch_size for indices in slices)
    assert np.array_equal(np.concatenate(slices), order.step_indices(step))


@pytest.mark.parametrize("num_samples", [8, 9, 16, 17, 31, 100, 257])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 1000])
@pytest.mark.parametrize("data_ranks", [1, 2, 3, 8])
def test_evaluation_sees_every_sample_once_in_as_many_batches_on_every_rank(
    num_samples: int, micro_batch_size: int, data_ranks: int
) -> None:
    ranks = [evaluation_batches(num_samples, micro_batch_size, rank, data_ranks) for rank in range(data_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= micro_batch_size + 1
    if num_samples >= data_ranks * -(-num_samples // (data_ranks * micro_batch_size)):
        assert max(sizes) <= micro_batch_size
    assert sorted(np.concatenate([batch for batches in ranks for batch in batches])) == list(range(num_samples))


def test_evaluation_of_fewer_samples_than_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 samples for 4 data ranks; raise data\.max_val_samples"):
        evaluation_batches(3, 8, 0, 4)


def test_a_subset_is_spread_evenly() -> None:
    assert evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly_spaced(10, 3).tolist() == [0, 3, 6]
    assert evenly_spaced(4, 100).tolist() == evenly_spaced(4, None).tolist() == [0, 1, 2, 3]
