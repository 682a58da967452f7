"""What a run logged, metric by metric: columns of numbers, as a run of many steps is too long for rows of objects."""

from __future__ import annotations

import csv
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np


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
    """The columns of a metrics.csv, whose rows of training and of validation leave each other's cells empty.

    A row that no newline ends is half a row, which a killed run may leave: it is left out.
    """
    whole_rows, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    head, _, rows = whole_rows.partition("\n")
    if not rows:
        return {}
    try:
        cells = np.loadtxt(StringIO(rows), dtype=object, delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(str(error).partition(";")[0]) from None  # behind it stands advice to programmers
    columns = dict(zip(next(csv.reader([head])), cells.T, strict=True))
    steps = columns.pop("step").astype(np.int64)
    filled = {key: column != "" for key, column in columns.items()}
    return {
        key: Column(array("q", steps[filled[key]].tobytes()), array("d", own[filled[key]].astype(np.float64).tobytes()))
        for key, own in columns.items()
        if filled[key].any()
    }


def joined(earlier: Column, later: Column) -> Column:
    return column_of(
        dict(zip(earlier.steps, earlier.values, strict=True)) | dict(zip(later.steps, later.values, strict=True))
    )
