"""What a run logged, metric by metric: columns of numbers, as a run of many steps is too long for rows of objects."""

from __future__ import annotations

import csv
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """One metric: its values, and the optimizer steps that they are of, ascending."""

    steps: array[int]
    values: array[float]


History = dict[str, Column]  # by the metric's key; without `step` itself


def history_of(rows: Iterable[Mapping[str, float]]) -> History:
    """Columns of rows that have a `step` each; of two values of a metric at one step, the later row's stands."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        step = int(row["step"])
        for key, value in row.items():
            values[key][step] = value
    values.pop("step", None)
    return {key: column_of(own) for key, own in values.items()}


def column_of(values: Mapping[int, float]) -> Column:
    steps = sorted(values)
    return Column(array("q", steps), array("d", (values[step] for step in steps)))


def read_history(folder: Path) -> History:
    """The metrics.csv of a run folder and its earlier attempts; where a later attempt repeats a step, it stands.

    Raises ValueError, KeyError or csv.Error where one is damaged.
    """
    attempts = sorted((path for path in folder.glob("attempts/*") if path.name.isdecimal()), key=lambda p: int(p.name))
    paths = [attempt / "metrics.csv" for attempt in (*attempts, folder)]
    return history_of(row for path in paths if path.is_file() for row in rows_of(path))


def rows_of(path: Path) -> Iterator[dict[str, float]]:
    """Rows of a metrics.csv; those of training and of validation at the same step are two."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        keys = next(reader, [])
        for cells in reader:
            yield {key: float(cell) for key, cell in zip(keys, cells, strict=True) if cell}
