"""The comparison as one HTML page that needs no network: conclusions, charts, and a table under each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from tracking.comparison import MEMORY_PARTS, Comparison, RunFigures, Spread
from tracking.conclusions import conclusions, named
from tracking.gantt import idle_share, spent_ms
from tracking.report import COMPARED, Column, best_cells, figure_cell
from tracking.shown import RULE

PARTS = Path(__file__).with_name("page")
GIB = 2**30

Rows = Iterable[Sequence[str]]


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page; a reader sees the whole of it or none."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(page(comparison), encoding="utf-8")
    aside.replace(path)


def page(comparison: Comparison) -> str:
    sections = _sections(comparison)
    template = Template((PARTS / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(_title(comparison)),
        facts=escape(_facts(comparison)),
        navigation="\n".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections),
        main="\n".join(_section(*section) for section in sections),
        style=(PARTS / "page.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        # `<` would end the script element where a name holds `</script>`.
        data=comparison.model_dump_json().replace("<", "\\u003c"),
        script=(PARTS / "page.js").read_text(encoding="utf-8"),
    )


def _title(comparison: Comparison) -> str:
    labels = [one.label for one in comparison.series]
    return named(labels) if len(labels) <= 4 else f"{len(comparison.runs)} runs compared"


def _facts(comparison: Comparison) -> str:
    count = len(comparison.runs)
    against = "" if comparison.reference is None else f"; differences and speed-ups are against {comparison.reference}"
    return f"{count} run{'' if count == 1 else 's'}{against}."


def _sections(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Name, heading and content of each."""
    makers: list[tuple[str, str, Callable[[Comparison], str]]] = [
        ("summary", "Summary", _summary),
        ("loss", "Loss", _loss),
        ("speed", "Speed", _speed),
        ("memory", "Memory", _memory),
        ("traffic", "Traffic", _traffic),
        ("step", "One step", _step),
        ("choice", "Time and memory", _choice),
        ("table", "All figures", _all_figures),
        ("config", "Configs", _config),
    ]
    if any(len(one.runs) > 1 for one in comparison.series):
        makers.append(("repeats", "Repeats", _repeats))
    return [(name, title, maker(comparison)) for name, title, maker in makers]


def _section(name: str, title: str, content: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{content}</section>'
    )


def _summary(comparison: Comparison) -> str:
    said = " ".join(conclusions(comparison)) or "There is too little measured to conclude anything."
    warnings = ""
    if comparison.doubts:
        items = "".join(f"<li>{escape(doubt.text)}</li>" for doubt in comparison.doubts)
        warnings = f'<div class="warnings" role="note"><h3>Warnings</h3><ul>{items}</ul></div>'
    boxes = "".join(
        f'<label><input type="checkbox" value="{place}" checked><span></span>{escape(one.label)}</label>'
        for place, one in enumerate(comparison.series)
    )
    return (
        f'<div class="conclusions"><p>{escape(said)}</p></div>{warnings}'
        f'<fieldset id="shown" class="shown"><legend>Runs shown in the charts</legend>{boxes}</fieldset>'
    )


def _loss(comparison: Comparison) -> str:
    kinds = (("steps", "optimizer steps"), ("tokens", "tokens"), ("seconds", "training time"))
    radios = "".join(
        f'<label><input type="radio" name="across" value="{value}"{" checked" * (value == "steps")}>{text}</label>'
        for value, text in kinds
    )
    about = (
        "Above, the training loss: the mean since the row before; large open marks are validation losses. Below, how "
        "far the training loss lies from that of the reference at the same step. Training time adds up the steps' "
        "times; start-up, validation and saving are not in it."
    )
    curves = [one.curve for one in comparison.series]
    lacking = _lacking(comparison, "losses by step", lambda run: bool(run.curve.steps))
    if not any(curve.steps for curve in curves):
        return lacking
    labels = [one.label for one in comparison.series]
    trained = [dict(zip(curve.steps, curve.train_loss, strict=True)) for curve in curves]
    validated = [dict(zip(curve.validations.steps, curve.validations.loss, strict=True)) for curve in curves]
    most = max(curve.logged for curve in curves)
    drawn = max(len(curve.steps) for curve in curves)
    if drawn < most:
        about += f" Of up to {most:,} rows of a run, {drawn:,} that are evenly spread are drawn; figures are of all."
    figures = _details(_losses("Training loss by optimizer step", labels, trained))
    if any(validated):
        table = _losses("Validation loss by optimizer step", labels, validated)
        figures += _details(table, "Validation losses as a table")
    return (
        f'<p class="about">{about}</p><fieldset id="across"><legend>Against</legend>{radios}</fieldset>'
        f"{_chart('loss', 'Line chart: training and validation loss, and the difference to the reference')}"
        f"{_key('loss')}{lacking}{figures}"
    )


def _losses(caption: str, labels: Sequence[str], by_step: Sequence[Mapping[int, float]]) -> str:
    steps = sorted({step for losses in by_step for step in losses})
    rows = [[str(step), *(_number(losses.get(step), ".5f") for losses in by_step)] for step in steps]
    return _table(caption, ["step", *labels], rows)


def _speed(comparison: Comparison) -> str:
    lacking = _lacking(comparison, "times", lambda run: run.tokens_per_s is not None)
    if not any("tokens_per_s" in one.spreads for one in comparison.series):
        return lacking
    panels = [
        _panel("speed", "Throughput", "Bar chart: tokens per second"),
        _panel("device", "Throughput of a device", "Bar chart: tokens per second per device"),
        _panel("efficiency", "Parallel efficiency", "Bar chart: parallel efficiency"),
        _panel("mfu", "Model FLOPs utilisation", "Bar chart: MFU"),
    ]
    about = (
        f"Speed-up is tokens/s over that of {comparison.reference}; parallel efficiency is the same per device. The "
        "lines at the bars' ends are standard deviations: over seeds, or of one run over its logged rows."
    )
    names = ("tokens_per_s", "tokens_per_s_per_device", "speed_up", "efficiency", "mfu")
    columns = [column for column in COMPARED if column.figure in names]
    rows = [[run.label, _text(run.ranks), *(figure_cell(run, column) for column in columns)] for run in comparison.runs]
    figures = _table("Speed", ["run", "devices", *(column.heading for column in columns)], rows)
    scaling = (
        "<h3>Speed-up by number of devices</h3><p class='note'>The dashed line is a speed-up equal to the number.</p>"
    )
    return (
        f'<p class="about">{escape(about)}</p><div class="panels">{"".join(panels)}</div>{scaling}'
        f"{_chart('scaling', 'Scatter chart: speed-up by number of devices')}{_key('scaling')}"
        f"{lacking}{_details(figures)}"
    )


def _memory(comparison: Comparison) -> str:
    about = (
        "What each rank held at its peak, rank by rank. Parameters, gradients, optimizer state, communication buffers "
        "and activations are measured, each at its own peak; other is what is left of the rank's peak. "
        "Of repeats, the first."
    )
    rows = [
        [run.label, str(rank), *(f"{getattr(held, part) / GIB:.3f}" for part in MEMORY_PARTS), f"{peak:.3f}"]
        for run in comparison.runs
        for rank, held, peak in zip(run.shown_ranks, run.memory, run.peak_gib_by_rank, strict=False)
    ]
    rows += [
        [run.label, str(rank), *["-"] * len(MEMORY_PARTS), f"{peak:.3f}"]
        for run in comparison.runs
        if not run.memory
        for rank, peak in zip(run.shown_ranks, run.peak_gib_by_rank, strict=False)
    ]
    lacking = _lacking(comparison, "memory by category", lambda run: bool(run.memory))
    if not rows:
        return lacking
    figures = _table("Memory in GiB", ["run", "rank", *MEMORY_PARTS, "peak"], rows)
    return (
        f'<p class="about">{about}</p><fieldset><label><input type="checkbox" id="other" checked>'
        f"with what is left, such as the interpreter and its libraries</label></fieldset>{_key('memory')}"
        f"{_chart('memory', 'Stacked bar chart: memory of each rank by category')}"
        f'<p class="note" id="memory-limit"></p>{_shown(comparison.runs)}{lacking}{_details(figures)}'
    )


def _shown(runs: Sequence[RunFigures]) -> str:
    """A line on the runs of which not all ranks are shown."""
    cut = [run for run in runs if run.ranks is not None and len(run.shown_ranks) < run.ranks]
    if not cut:
        return ""
    numbers = [f"{len(run.shown_ranks)} of {run.ranks:,} ranks of {run.label}" for run in cut]
    return f'<p class="note">Shown are {escape(named(numbers))}: {RULE}.</p>'


def _traffic(comparison: Comparison) -> str:
    lacking = _lacking(comparison, "traffic", lambda run: bool(run.traffic) or run.ranks == 1)
    waits = [run for run in comparison.runs if run.wait_share is not None]
    sent = [run for run in comparison.runs if run.traffic]
    if not sent and not waits:
        return lacking
    panels = [
        f"<div><h3>Bytes handed to collectives</h3>{_key('traffic')}"
        f"{_chart('traffic', 'Stacked bar chart: bytes per step by collective and axis')}</div>",
        "<div><h3>Share of a step spent waiting for other ranks</h3>"
        '<p class="note">Bars are means over the ranks; each mark is a rank.</p>'
        f"{_chart('wait', 'Bar chart: share of a step spent waiting for other ranks')}</div>",
    ]
    rows = [
        [
            run.label,
            part.collective,
            part.axis,
            f"{part.calls:,.1f}",
            f"{part.payload / 1e6:,.4f}",
            _number(part.seconds and 1000 * part.seconds, ",.3f"),
        ]
        for run in sent
        for part in run.traffic
    ]
    headings = ["run", "collective", "axis", "calls", "MB", "ms under way"]
    shares = [[run.label, _number(run.wait_share, ".1%"), _number(run.idle_share, ".1%")] for run in waits]
    return (
        '<p class="about">Per optimizer step, mean over the ranks; of repeats, the first.</p>'
        f'<div class="panels">{"".join(panels)}</div>{_shown(waits)}{lacking}'
        f"{_details(_table('Traffic of a step, mean of a rank', headings, rows))}"
        f"{_details(_table('Waiting', ['run', 'waits', 'of it, nothing under way'], shares), 'Waiting as a table')}"
    )


def _step(comparison: Comparison) -> str:
    traced = [(place, run) for place, run in enumerate(comparison.runs) if run.gantt]
    lacking = _lacking(comparison, "a trace of a step", lambda run: bool(run.gantt))
    if not traced:
        return lacking
    options = "".join(f'<option value="{place}">{escape(run.label)}</option>' for place, run in traced)
    kinds = list(dict.fromkeys(bar.category for _, run in traced for bar in run.gantt))
    rows = [
        [
            run.label,
            str(rank),
            *(f"{spent_ms(run.gantt, rank, kind):,.2f}" for kind in kinds),
            f"{idle_share(run.gantt, rank):.1%}",
        ]
        for _, run in traced
        for rank in sorted({bar.rank for bar in run.gantt})
    ]
    headings = ["run", "rank", *kinds, "share of the step that it waits"]
    figures = _table("Milliseconds of the step by kind of work, waits left out of it", headings, rows)
    about = (
        "The last step that was traced, rank by rank, on one clock: the wide lane is what the rank computed, the "
        "narrow one below which collectives were under way. Numbers are micro-batches. trace.json in the run's "
        "folder opens in Perfetto or chrome://tracing."
    )
    return (
        f'<p class="about">{about}</p><p><label for="traced">Run </label><select id="traced">{options}</select></p>'
        f"{_key('gantt')}{_chart('gantt', 'Gantt chart of one optimizer step by rank')}"
        f"{_shown([run for _, run in traced])}{lacking}{_details(figures)}"
    )


def _choice(comparison: Comparison) -> str:
    placed = [one for one in comparison.series if {"seconds_to_target", "peak_gib"} <= one.spreads.keys()]
    lacking = _lacking(comparison, "the time to that loss", lambda run: run.seconds_to_target is not None)
    if not placed or comparison.target_loss is None:
        return lacking
    about = (
        f"Training time to a loss of {comparison.target_loss:.4g} against the memory of the fullest device. Runs on "
        "the stepped line are the Pareto front: no other needs both less time and less memory."
    )
    rows = [
        [
            one.label,
            f"{one.spreads['seconds_to_target'].mean:,.1f}",
            f"{one.spreads['peak_gib'].mean:.3f}",
            "yes" if one.on_front else "no",
        ]
        for one in placed
    ]
    figures = _table("Time and memory", ["run", "s to the loss", "peak GiB", "on the front"], rows)
    chart = _chart("pareto", "Scatter chart: time to a loss against memory per device")
    return f'<p class="about">{about}</p>{chart}{_key("pareto")}{lacking}{_details(figures)}'


def _all_figures(comparison: Comparison) -> str:
    bests = best_cells(comparison.runs)
    headings = ["run", "mesh", "steps", *(column.heading for column in COMPARED), "p95 ms", "wall s", "start-up s"]
    rows = []
    for run in comparison.runs:
        cells = [_mark(figure_cell(run, column), bests[column.figure]) for column in COMPARED]
        times = [_number(value, ",.1f") for value in (run.step_ms_p95, run.wall_s, run.startup_s)]
        state = run.state if run.error is None else f"{run.state}: {run.error}"
        fixed = [escape(text) for text in (run.label, run.mesh or "-", _text(run.steps))]
        rows.append([*fixed, *cells, *times, _text(run.verdict), escape(state), escape("; ".join(run.missing)) or "-"])
    about = (
        "Difference is the largest of the training loss from the reference's; mesh is pipe x data x tensor; sent is "
        "the mean of a rank. The best of a column is marked ★."
    )
    headings += ["certificate", "state", "what is missing"]
    return f'<p class="about">{about}</p>' + _table(
        "All figures, one run a row", headings, rows, raw=True, words=(len(headings) - 2, len(headings) - 1)
    )


def _mark(cell: str, best: str | None) -> str:
    if cell != best:
        return cell
    return f'<span class="best"><span aria-hidden="true">★ </span>{cell}<span class="unseen"> (best)</span></span>'


def _config(comparison: Comparison) -> str:
    if not comparison.differences:
        return "<p>The configs of these runs do not differ.</p>"
    rows = [
        [one.key if first else "", value, ", ".join(labels)]
        for one in comparison.differences
        for first, (value, labels) in zip([True, *[False] * len(one.values)], one.values.items(), strict=False)
    ]
    return _table("Keys that differ", ["key", "value", "runs"], rows, words=(1, 2))


def _repeats(comparison: Comparison) -> str:
    names = [column for column in COMPARED if any(column.figure in one.spreads for one in comparison.series)]
    rows = [
        [
            one.label,
            str(len({comparison.runs[place].seed for place in one.runs})),
            str(len(one.runs)),
            *(_mean(one.spreads.get(column.figure), column) for column in names),
        ]
        for one in comparison.series
    ]
    about = (
        "Runs that differ by seed alone: mean ± standard deviation. Two means that lie no further apart than their "
        "deviations together are said not to differ."
    )
    return f'<p class="about">{about}</p>' + _table(
        "Repeats", ["run", "seeds", "runs", *(c.heading for c in names)], rows
    )


def _mean(spread: Spread | None, column: Column) -> str:
    if spread is None:
        return "-"
    text = format(spread.mean * column.scale, column.form)
    if spread.count == 1 or spread.deviation is None:
        return text
    return f"{text} ± {format(spread.deviation * column.scale, column.form)}"


def _lacking(comparison: Comparison, what: str, has: Callable[[RunFigures], bool]) -> str:
    """A line on the runs that have not got it."""
    lacking = [run.label for run in comparison.runs if not has(run)]
    if not lacking:
        return ""
    who = "any of these runs" if len(lacking) == len(comparison.runs) else named(lacking)
    return f'<p class="note">Not recorded by {escape(who)}: {what}.</p>'


def _panel(name: str, title: str, described: str) -> str:
    return f"<div><h3>{title}</h3>{_chart(name, described)}</div>"


def _chart(name: str, described: str) -> str:
    label = f"{described}; the figures are in the table below."
    return f'<div class="chart" id="{name}-chart" role="img" aria-label="{label}"></div>'


def _key(name: str) -> str:
    return f'<ul class="key" id="{name}-key" aria-hidden="true"></ul>'


def _details(table: str, summary: str = "Figures as a table") -> str:
    return f"<details><summary>{summary}</summary>{table}</details>"


def _table(caption: str, headings: Sequence[str], rows: Rows, *, raw: bool = False, words: Sequence[int] = ()) -> str:
    """`raw` cells are HTML already; columns that are `words` begin at the left, and their lines may break."""
    head = "".join(
        f'<th scope="col"{_words(place in words)}>{escape(heading)}</th>' for place, heading in enumerate(headings)
    )
    body = "".join(f"<tr>{_cells(row if raw else [escape(cell) for cell in row], words)}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[str], words: Sequence[int]) -> str:
    cells = "".join(f"<td{_words(place in words)}>{cell}</td>" for place, cell in enumerate(row[1:], start=1))
    return f'<th scope="row">{row[0]}</th>{cells}'


def _words(are: bool) -> str:
    return ' class="text"' if are else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
