"""Where a chain of modules is cut into pipeline stages: by what its modules cost, not by their number."""

from collections.abc import Callable, Sequence
from itertools import accumulate

# Stages may be so much slower than in the fastest cut if their parameters are spread more evenly by it.
SLACK = 1.02


def cut(flops: Sequence[int], parameters: Sequence[int], stages: int) -> list[range]:
    """Positions of the units of each stage, in order; every stage has a unit with parameters.

    The slowest stage bounds the pipeline's pace, so its `flops` are made as few as possible; among the cuts that come
    within SLACK of that, the one whose largest stage has the fewest `parameters` is taken. ValueError if there are too
    few units.
    """
    fastest = narrowest(flops, stages, lambda first, end: sum(parameters[first:end]) > 0)
    limit = SLACK * max(sum(flops[part.start : part.stop]) for part in fastest)
    return narrowest(
        parameters,
        stages,
        lambda first, end: sum(parameters[first:end]) > 0 and sum(flops[first:end]) <= limit,
    )


def narrowest(costs: Sequence[int], stages: int, allowed: Callable[[int, int], bool]) -> list[range]:
    """The cut into `stages` runs whose dearest one is cheapest; `allowed(first, end)` says which runs may be.

    Dynamic programming over the ends of runs (Bellman 1957): best[end] is the cheapest cut of the first `end` units.
    """
    sums = [0, *accumulate(costs)]
    units = len(costs)
    best: dict[int, tuple[int, list[range]]] = {0: (0, [])}
    for _ in range(stages):
        longer: dict[int, tuple[int, list[range]]] = {}
        for end in range(1, units + 1):
            choices = [
                (max(worst, sums[end] - sums[first]), [*parts, range(first, end)])
                for first, (worst, parts) in best.items()
                if first < end and allowed(first, end)
            ]
            if choices:
                longer[end] = min(choices, key=lambda choice: choice[0])
        best = longer
    if units not in best:
        raise ValueError(
            f"{units} modules in a chain cannot make {stages} pipeline stages with parameters in each; shrink "
            f"strategy.mesh.pipe or strategy.stages_per_rank."
        )
    return best[units][1]
