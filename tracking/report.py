"""Runs side by side: a table for the terminal or a text file."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tracking.comparison import Comparison, RunFigures, best_run
from tracking.conclusions import conclusions
from tracking.record import Results
from tracking.sources import Run

PLAIN_WIDTH = 10_000  # columns of a console that is no terminal: wider than any row, so that nothing is cut

COLUMNS = ("train loss", "val loss", "tokens/s", "step ms p50 (p95)", "MFU", "peak GiB/rank", "wall s")


class Column(NamedTuple):
    """A figure of RunFigures in a table; `scale` turns its unit into the heading's."""

    heading: str
    figure: str
    form: str
    scale: float = 1.0


COMPARED = (
    Column("train loss", "train_loss", ".4f"),
    Column("val loss", "val_loss", ".4f"),
    Column("difference", "loss_difference", ".1e"),
    Column("tokens/s", "tokens_per_s", ",.0f"),
    Column("per device", "tokens_per_s_per_device", ",.0f"),
    Column("speed-up", "speed_up", ".2f"),
    Column("efficiency", "efficiency", ".0%"),
    Column("MFU", "mfu", ".1%"),
    Column("step ms", "step_ms_p50", ",.1f"),
    Column("peak GiB/rank", "peak_gib", ".2f"),
    Column("sent MB/step", "sent_bytes", ",.2f", 1e-6),
    Column("waits", "wait_share", ".0%"),
)
# No run is best in these: the reference's difference from itself is nothing.
UNRATED = ("loss_difference",)


def runs_table(runs: Sequence[Run]) -> Table:
    """One row per run, in the order given; a run without a record shows what became of it."""
    table = _table(COLUMNS)
    for run in runs:
        ranks, figures = "-", ["-"] * len(COLUMNS)
        if run.record is not None:
            ranks, figures = str(run.record.world_size), result_cells(run.record.results)
        _add_row(table, run.name, run.strategy, ranks, figures, run.state, run.error)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row per run; `*` marks the best of a column."""
    table = _table([column.heading for column in COMPARED])
    bests = best_cells(comparison.runs)
    for run in comparison.runs:
        cells = {column.figure: figure_cell(run, column) for column in COMPARED}
        figures = [f"*{cell}" if cell == bests[figure] else cell for figure, cell in cells.items()]
        ranks = "-" if run.ranks is None else str(run.ranks)
        _add_row(table, run.label, run.strategy, ranks, figures, run.state, run.error)
    return table


def best_cells(runs: Sequence[RunFigures]) -> dict[str, str | None]:
    """By figure of COMPARED, the best as it is written; None where all are written the same."""
    cells: dict[str, str | None] = dict.fromkeys(column.figure for column in COMPARED)
    for column in COMPARED:
        written = {figure_cell(run, column) for run in runs if math.isfinite(getattr(run, column.figure) or 0.0)}
        written -= {figure_cell(None, column)}
        place = best_run(runs, column.figure)
        if column.figure not in UNRATED and len(written) > 1 and place is not None:
            cells[column.figure] = figure_cell(runs[place], column)
    return cells


def figure_cell(run: RunFigures | None, column: Column) -> str:
    """The figure as text; `-` for what was not measured."""
    value = None if run is None else getattr(run, column.figure)
    return _cell(None if value is None else value * column.scale, column.form)


def result_cells(results: Results) -> list[str]:
    """Cells of COLUMNS; `-` for what was not measured."""
    step_ms = "-"
    if results.step_ms_p50 is not None and results.step_ms_p95 is not None:
        step_ms = f"{results.step_ms_p50:,.1f} ({results.step_ms_p95:,.1f})"
    return [
        _cell(results.train_loss, ".4f"),
        _cell(results.val_loss, ".4f"),
        _cell(results.tokens_per_s, ",.0f"),
        step_ms,
        _cell(results.mfu, ".1%"),
        _cell(max(results.peak_gib, default=None), ".2f"),
        _cell(results.wall_s, ",.1f"),
    ]


def print_runs(runs: Sequence[Run], stream: TextIO | None = None) -> None:
    """Print the table on `stream` (stdout by default): fitted to a terminal, else plain text with nothing cut."""
    _print(runs_table(runs), stream or sys.stdout)


def print_comparison(comparison: Comparison, stream: TextIO | None = None) -> None:
    """Print table, conclusions and warnings on `stream` (stdout by default)."""
    stream = stream or sys.stdout
    _print(comparison_table(comparison), stream)
    said = " ".join(conclusions(comparison))
    if said:
        _print(Text(f"{said}\n"), stream)
    for doubt in comparison.doubts:
        _print(Text(f"warning: {doubt.text}"), stream)


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "strategy", "ranks"):
        table.add_column(heading, no_wrap=heading != "run", justify="right" if heading == "ranks" else "left")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("state")
    return table


def _add_row(
    table: Table, name: str, strategy: str | None, ranks: str, figures: Sequence[str], state: str, error: str | None
) -> None:
    # Text, because a message may hold [brackets] that rich would take for its markup.
    table.add_row(Text(name), strategy or "-", ranks, *figures, Text(state if error is None else f"{state}: {error}"))


def _print(content: RenderableType, stream: TextIO) -> None:
    if stream.isatty():
        Console(file=stream).print(content)
        return
    plain = Console(file=stream, width=PLAIN_WIDTH, force_terminal=False, color_system=None)
    with plain.capture() as capture:
        plain.print(content)
    stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
