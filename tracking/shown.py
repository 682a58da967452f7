"""Which of a large run's ranks are shown: charts of hundreds would be neither small nor readable."""

from collections.abc import Sequence

MOST_RANKS = 16
RULE = "the first and the last, the one that waited least, the one that held most, and others evenly spread"


def shown_ranks(count: int, wait_share: Sequence[float] = (), peak_gib: Sequence[float] = ()) -> list[int]:
    """By RULE of more than MOST_RANKS, else all; the rank that waits least is the one that others wait for."""
    if count <= MOST_RANKS:
        return list(range(count))
    shown = {
        choose(range(count), key=values.__getitem__)
        for choose, values in ((min, wait_share), (max, peak_gib))
        if len(values) == count
    }
    spread = MOST_RANKS - len(shown - {0, count - 1})
    return sorted(shown | {round(place * (count - 1) / (spread - 1)) for place in range(spread)})
