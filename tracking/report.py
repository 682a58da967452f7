"""RunRecords side by side: a table for the terminal or a text file."""

import sys
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracking.record import Results
from tracking.sources import Run

PLAIN_WIDTH = 10_000  # columns of a console that is no terminal: wider than any row, so that nothing is cut

COLUMNS = ("train loss", "val loss", "tokens/s", "step ms p50 (p95)", "MFU", "peak GiB/rank", "wall s")


def runs_table(runs: Sequence[Run]) -> Table:
    """One row per run, in the order given; a run without a record shows what became of it."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "strategy", "ranks"):
        table.add_column(heading, no_wrap=heading != "run", justify="right" if heading == "ranks" else "left")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("state")
    for run in runs:
        ranks, figures = "-", ["-"] * len(COLUMNS)
        if run.record is not None:
            ranks, figures = str(run.record.world_size), result_cells(run.record.results)
        state = run.state if run.error is None else f"{run.state}: {run.error}"
        # Text, because a message may hold [brackets] that rich would take for its markup.
        table.add_row(Text(run.name), run.strategy or "-", ranks, *figures, Text(state))
    return table


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
    stream = stream or sys.stdout
    if stream.isatty():
        Console(file=stream).print(runs_table(runs))
        return
    plain = Console(file=stream, width=PLAIN_WIDTH, force_terminal=False, color_system=None)
    with plain.capture() as capture:
        plain.print(runs_table(runs))
    stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
