"""What a run logged, metric by metric: columns of numbers, as a run of many steps is too long for rows of objects."""

from __future__ import annotations

import csv
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
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
    history: History = {}
    for path in (attempt / "metrics.csv" for attempt in (*attempts, folder)):
        if path.is_file():
            for key, column in columns_of(path).items():
                history[key] = joined(history[key], column) if key in history else column
    return history


def columns_of(path: Path) -> History:
    """The columns of a metrics.csv, whose rows of training and of validation leave each other's cells empty."""
    with path.open(encoding="utf-8", newline="") as file:
        keys, *rows = list(csv.reader(file)) or [[]]
    if rows and len(rows[-1]) < len(keys):
        rows.pop()  # a run that was killed may have left half a row
    cells = dict(zip(keys, zip(*rows, strict=True), strict=True)) if rows else {}
    steps = array("q", map(int, cells.pop("step"))) if cells else array("q")
    return {
        key: Column(array("q", compress(steps, column)), array("d", map(float, filter(None, column))))
        for key, column in cells.items()
        if any(column)
    }


def joined(earlier: Column, later: Column) -> Column:
    return column_of(
        dict(zip(earlier.steps, earlier.values, strict=True)) | dict(zip(later.steps, later.values, strict=True))
    )
