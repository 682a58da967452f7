"""Cuts of a chain into stages: the best there is, found again by trying all."""

import itertools
import random
from collections.abc import Iterator

import pytest

from strategies.cutting import SLACK, cut, narrowest


def all_cuts(units: int, stages: int) -> Iterator[list[range]]:
    for ends in itertools.combinations(range(1, units), stages - 1):
        yield [range(first, end) for first, end in itertools.pairwise((0, *ends, units))]


def worst(costs: list[int], parts: list[range]) -> int:
    return max(sum(costs[unit] for unit in part) for part in parts)


def has_parameters_everywhere(parameters: list[int], parts: list[range]) -> bool:
    return all(any(parameters[unit] for unit in part) for part in parts)


def chains() -> Iterator[tuple[list[int], list[int], int]]:
    """Small chains at random; every third unit or so has no FLOPs, or no parameters, as an embedding or a GELU."""
    chance = random.Random(0)
    for _ in range(400):
        units = chance.randint(1, 9)
        flops = [chance.choice((0, 10, 10, 10, chance.randint(1, 40))) for _ in range(units)]
        parameters = [chance.choice((0, 5, chance.randint(1, 40))) for _ in range(units)]
        yield flops, parameters, chance.randint(1, min(units, 5))


POSSIBLE = [
    (flops, parameters, stages)
    for flops, parameters, stages in chains()
    if any(has_parameters_everywhere(parameters, parts) for parts in all_cuts(len(flops), stages))
]
IMPOSSIBLE = [chain for chain in chains() if chain not in POSSIBLE]


def test_there_are_chains_of_both_kinds() -> None:
    assert len(POSSIBLE) > 200
    assert len(IMPOSSIBLE) > 50


def test_stages_are_all_of_the_chain_in_order_with_parameters_in_each() -> None:
    for flops, parameters, stages in POSSIBLE:
        parts = cut(flops, parameters, stages)
        assert len(parts) == stages
        assert list(itertools.chain(*parts)) == list(range(len(flops)))
        assert has_parameters_everywhere(parameters, parts)


def test_no_cut_has_a_faster_slowest_stage_or_within_the_slack_a_smaller_largest() -> None:
    for flops, parameters, stages in POSSIBLE:
        possible = [parts for parts in all_cuts(len(flops), stages) if has_parameters_everywhere(parameters, parts)]
        fastest = min(worst(flops, parts) for parts in possible)
        within = [parts for parts in possible if worst(flops, parts) <= SLACK * fastest]
        chosen = cut(flops, parameters, stages)
        assert worst(flops, chosen) <= SLACK * fastest
        assert worst(parameters, chosen) == min(worst(parameters, parts) for parts in within)


def test_parameters_break_ties_in_time() -> None:
    flops, parameters = [100, 100, 100], [1, 1, 9]
    assert cut(flops, parameters, 2) == [range(2), range(2, 3)]
    assert cut(flops, parameters[::-1], 2) == [range(1), range(1, 3)]


@pytest.mark.parametrize(("middle", "stop"), [(0, 1), (2, 1), (3, 2)])
def test_parameters_may_cost_the_slack_and_no_more(middle: int, stop: int) -> None:
    """The middle unit has many: it goes with the small last one where that stage gets slower by 2 % at most."""
    assert cut([100 - middle, middle, 100], [9, 9, 1], 2)[0].stop == stop


def test_without_flops_parameters_decide() -> None:
    """What a module without stats is cut by."""
    assert cut([0] * 5, [4, 1, 1, 1, 4], 3) == [range(1), range(1, 4), range(4, 5)]


def test_module_without_parameters_goes_with_another() -> None:
    assert cut([1, 100, 1], [1, 0, 1], 2) in ([range(1), range(1, 3)], [range(2), range(2, 3)])


def test_chain_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 modules in a chain cannot make 3 pipeline stages .* strategy\.mesh\.pipe"):
        cut([1, 1], [1, 1], 3)
    with pytest.raises(ValueError, match="3 modules in a chain cannot make 3 pipeline stages with parameters in each"):
        cut([1, 1, 1], [1, 0, 1], 3)
    for flops, parameters, stages in IMPOSSIBLE:
        with pytest.raises(ValueError, match=f"{len(flops)} modules"):
            cut(flops, parameters, stages)


def test_one_stage_is_all() -> None:
    assert narrowest([3, 1, 2], 1, lambda first, end: True) == [range(3)]
