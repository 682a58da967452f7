"""The page's charts as PNG, for papers; drawn by matplotlib."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tracking.comparison import MEMORY_PARTS, Comparison, RunFigures, Series

GIB = 2**30
DPI = 200
WIDTH = 7.2  # inches: a paper's two columns

# Those of page.js: Okabe and Ito's palette, which colour-blind people tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "P", "X", "*")
MEMORY = dict(
    zip(MEMORY_PARTS, ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#999999"), strict=True)
)  # by category
HATCHES = {"gradients": "///", "buffers": "xxx", "activations": "\\\\\\"}
AXES = {"pipe": "xxx", "data": "", "tensor": "///", "mixed": "..."}
WORK = {
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "weight": "#009e73",
    "optimizer": "#e69f00",
    "collective": "#d55e00",
    "data": "#cc79a7",
    "idle": "#d7dadd",
}


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write those for which there are figures; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "loss": _loss(comparison),
        "speed": _speed(comparison),
        "memory": _memory(comparison),
        "traffic": _traffic(comparison),
        "pareto": _pareto(comparison),
        **{f"step-{place}-{run.name}": _step(run) for place, run in enumerate(comparison.runs) if run.gantt},
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            path = folder / f"{name.replace('/', '-')}.png"
            figure.savefig(path, dpi=DPI)
            paths.append(path)
    return paths


def _figure(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _style(place: int) -> dict[str, Any]:
    turn = place // len(PALETTE)
    return {
        "color": PALETTE[place % len(PALETTE)],
        "linestyle": DASHES[turn % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markerfacecolor": "none" if turn % 2 else PALETTE[place % len(PALETTE)],
    }


def _filled(colour: str, hatch: str) -> dict[str, Any]:
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7, frameon=False)


def _loss(comparison: Comparison) -> Figure | None:
    drawn = [(place, one) for place, one in enumerate(comparison.series) if one.curve.steps]
    if not drawn:
        return None
    figure, axes = _figure(4.6, rows=2, sharex=True, height_ratios=(2, 1))
    above, below = axes[:, 0]
    for order, (place, one) in enumerate(drawn):
        curve = one.curve
        # Lines that lie on each other stay visible: the first is the widest.
        width = 1.0 + 2.5 * (len(drawn) - 1 - order) / len(drawn)
        every = max(1, len(curve.steps) // 12)
        look = _style(place) | {"linewidth": width, "markersize": 4, "markevery": every}
        above.plot(curve.steps, curve.train_loss, label=one.label, **look)
        validated = {"linestyle": "none", "markersize": 7, "markerfacecolor": "none", "markevery": 1}
        above.plot(curve.validations.steps, curve.validations.loss, **look | validated)
        known = [(step, value) for step, value in zip(curve.steps, curve.difference, strict=True) if value is not None]
        if known:
            below.plot(*zip(*known, strict=True), **look)
    has_validations = any(one.curve.validations.steps for _, one in drawn)
    above.set_ylabel("training loss (open marks: validation)" if has_validations else "training loss")
    below.set_ylabel(f"difference to {comparison.reference}")
    below.set_xlabel("optimizer steps")
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _legend_below(figure, *above.get_legend_handles_labels())
    return figure


def _speed(comparison: Comparison) -> Figure | None:
    series = [one for one in comparison.series if "tokens_per_s" in one.spreads]
    if not series:
        return None
    shown = (("tokens_per_s", "tokens/s", 1), ("efficiency", "parallel efficiency (%)", 100), ("mfu", "MFU (%)", 100))
    figure, axes = _figure(0.9 + 0.19 * len(series), columns=3, sharey=True)
    for axis, (name, title, scale) in zip(axes[0], shown, strict=True):
        _bars(axis, series, name, title, scale)
    return figure


def _bars(axis: Axes, series: Sequence[Series], name: str, title: str, scale: float) -> None:
    known = [(row, one.spreads[name]) for row, one in enumerate(series) if name in one.spreads]
    means = [spread.mean * scale for _, spread in known]
    errors = [(spread.deviation or 0.0) * scale for _, spread in known]
    axis.barh(
        [row for row, _ in known], means, xerr=errors, color="#4c8fbd", error_kw={"elinewidth": 0.8, "capsize": 2}
    )
    _rows(axis, [one.label for one in series])
    axis.set_xlabel(title)


def _rows(axis: Axes, labels: Sequence[str]) -> None:
    """The first on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


def _memory(comparison: Comparison) -> Figure | None:
    first = [(one.label, comparison.runs[one.runs[0]]) for one in comparison.series]
    rows = [(label, run, rank) for label, run in first for rank in range(len(run.memory) or len(run.peak_gib_by_rank))]
    if not rows:
        return None
    figure, axes = _figure(0.9 + 0.15 * len(rows))
    axis = axes[0, 0]
    handles: dict[str, Patch] = {}
    for row, (_, run, rank) in enumerate(rows):
        left = 0.0
        for part in MEMORY_PARTS if run.memory else ():
            size = getattr(run.memory[rank], part) / GIB
            look = _filled(MEMORY[part], HATCHES.get(part, ""))
            axis.barh(row, size, left=left, **look)
            handles.setdefault(part, Patch(label=part, **look))
            left += size
        if not run.memory:
            axis.barh(row, run.peak_gib_by_rank[rank], color="#8a94a0")
            handles.setdefault("peak, not told apart", Patch(color="#8a94a0"))
    named = [(label, run.shown_ranks[place]) for label, run, place in rows]
    _rows(axis, [f"{label} · {rank}" if rank == 0 else str(rank) for label, rank in named])
    limits = {run.memory_limit / GIB for _, run, _ in rows if run.memory_limit}
    for limit in limits:
        if limit <= 3 * axis.get_xlim()[1]:
            axis.axvline(limit, color="#d55e00", linestyle="--", label="limit")
    axis.set_xlabel("GiB of each rank at its peak")
    _legend_below(figure, list(handles.values()), list(handles))
    return figure


def _traffic(comparison: Comparison) -> Figure | None:
    found = [(one.label, comparison.runs[one.runs[0]]) for one in comparison.series]
    found = [(label, run) for label, run in found if run.traffic]
    if not found:
        return None
    figure, axes = _figure(1.4 + 0.19 * len(found), columns=2, sharey=True)
    sent, waits = axes[0]
    kinds = sorted({part.collective for _, run in found for part in run.traffic})
    handles: dict[str, Patch] = {}
    for row, (_, run) in enumerate(found):
        left = 0.0
        for part in sorted(run.traffic, key=lambda part: (part.collective, part.axis)):
            colour = PALETTE[kinds.index(part.collective) % (len(PALETTE) - 1)]
            look = _filled(colour, AXES[part.axis])
            sent.barh(row, part.payload / 1e6, left=left, **look)
            handles.setdefault(f"{part.collective} · {part.axis}", Patch(**look))
            left += part.payload / 1e6
        if run.wait_share is not None:
            waits.barh(row, 100 * run.wait_share, color="#4c8fbd")
    for axis in (sent, waits):
        _rows(axis, [label for label, _ in found])
    sent.set_xlabel("MB per optimizer step and rank")
    waits.set_xlabel("waiting for other ranks (% of a step)")
    _legend_below(figure, list(handles.values()), list(handles))
    return figure


def _pareto(comparison: Comparison) -> Figure | None:
    needed = {"seconds_to_target", "peak_gib"}
    placed = [(place, one) for place, one in enumerate(comparison.series) if needed <= one.spreads.keys()]
    if not placed or comparison.target_loss is None:
        return None
    figure, axes = _figure(3.6)
    axis = axes[0, 0]
    points = [(one.spreads["seconds_to_target"].mean, one.spreads["peak_gib"].mean) for _, one in placed]
    front = sorted(point for point, (_, one) in zip(points, placed, strict=True) if one.on_front)
    axis.step(*zip(*front, strict=True), where="post", color="#777777", linewidth=1)
    for (time, memory), (place, one) in zip(points, placed, strict=True):
        look = _style(place) | {"linestyle": "none"}
        axis.plot([time], [memory], markersize=9 if one.on_front else 6, label=one.label, **look)
    axis.set_xlabel(f"s of training to a loss of {comparison.target_loss:.4g}")
    axis.set_ylabel("peak GiB of the fullest device")
    axis.set_xlim(left=0)
    _legend_below(figure, *axis.get_legend_handles_labels())
    return figure


def _step(run: RunFigures) -> Figure:
    ranks = sorted({bar.rank for bar in run.gantt})
    figure, axes = _figure(1.2 + 0.4 * len(ranks))
    axis = axes[0, 0]
    lanes: dict[tuple[int, bool, str], list[tuple[float, float]]] = defaultdict(list)
    for bar in run.gantt:
        lanes[ranks.index(bar.rank), bar.lane > 0, bar.category].append((bar.start_ms, bar.duration_ms))
    for (row, is_communication, kind), spans in lanes.items():
        where = (row + 0.26, 0.22) if is_communication else (row - 0.23, 0.46)
        axis.broken_barh(spans, where, facecolor=WORK[kind], edgecolor="white", linewidth=0.3)
    _rows(axis, [f"rank {rank}" for rank in ranks])
    axis.set_xlabel("ms of one step" if run.gantt_step is None else f"ms of optimizer step {run.gantt_step}")
    axis.set_title(run.label)
    kinds = [kind for kind in WORK if any(bar.category == kind for bar in run.gantt)]
    _legend_below(figure, [Patch(color=WORK[kind]) for kind in kinds], kinds)
    return figure
