"""A comparison as a W&B Report, for the team: our sentences and warnings above W&B's own charts of the same runs."""

from collections.abc import Sequence
from typing import Any

import wandb
from wandb_workspaces import expr
from wandb_workspaces.reports import v2 as wr

from tracking.comparison import Comparison
from tracking.conclusions import conclusions, named
from tracking.redact import redact
from tracking.report import COMPARED, figure_cell
from tracking.wandb_config import COMPARE, Group
from tracking.wandb_run import TROUBLE, be_quiet, close_service, first_line, has_api_key

TITLE_LENGTH = 128  # W&B's limit
LOSSES = ("train/loss", "val/loss")
AXES = {"step": "optimizer steps", "tokens": "tokens", "time_s": "seconds of training"}
# Of the summary; a record's peak_gib is a list, which W&B draws no bars of, the last row's is of the fullest rank.
BARS = {
    "record/tokens_per_s": "tokens per second",
    "record/step_ms_p50": "ms per step",
    "record/mfu": "model FLOPs utilisation",
    "mem/peak_gib": "peak GiB of the fullest rank",
}


def write_report(comparison: Comparison, groups: Sequence[Group]) -> str:
    """Make a report of the runs of `groups`, which are of one project; its address.

    Raises ValueError in one line where there is no key, no server or no such project.
    """
    be_quiet()
    host = redact(wandb.setup().settings.base_url)
    if not has_api_key():
        raise ValueError(f"--wandb-report: no API key for {host}; `wandb login` stores one, or set WANDB_API_KEY.")
    try:
        entity, project = groups[0].entity or wandb.Api().default_entity or "", groups[0].project
        report = wr.Report(
            project=project,
            entity=entity,
            title=f"Comparison: {named([one.label for one in comparison.series])}"[:TITLE_LENGTH],
            blocks=_blocks(comparison, entity, project, [group.name for group in groups]),
            width="fluid",
        )
        return report.save().url
    except (*TROUBLE, ValueError) as error:
        raise ValueError(f"--wandb-report: {host} makes none: {first_line(error)}") from None
    finally:
        close_service()


def _blocks(comparison: Comparison, entity: str, project: str, groups: Sequence[str]) -> list[Any]:
    doubts: list[Any] = [doubt.text for doubt in comparison.doubts]
    warnings = [wr.H2("Warnings"), wr.UnorderedList(doubts)] if doubts else []
    said = " ".join(conclusions(comparison)) or "There is too little measured to conclude anything."
    runs = wr.Runset(
        entity=entity,
        project=project,
        name=named(groups),
        filters=[expr.Metric("Group").isin(list(groups)), expr.Metric("JobType") != COMPARE],
        groupby=["JobType"],
    )
    lines = [
        wr.LinePlot(title=f"{loss} by {title}", x=axis, y=[loss]) for loss in LOSSES for axis, title in AXES.items()
    ]
    bars = [wr.BarPlot(title=title, metrics=[metric]) for metric, title in BARS.items()]
    return [
        wr.P(said),
        *warnings,
        wr.H2("Charts"),
        wr.PanelGrid(runsets=[runs], panels=[*lines, *bars]),
        wr.H2("All figures"),
        wr.MarkdownBlock(_table(comparison)),
    ]


def _table(comparison: Comparison) -> str:
    """One row per run, in Markdown."""
    rows = [["run", "ranks", *(column.heading for column in COMPARED), "state"], ["---"] * (len(COMPARED) + 3)]
    for run in comparison.runs:
        ranks = "-" if run.ranks is None else str(run.ranks)
        state = run.state if run.error is None else f"{run.state}: {run.error}"
        cells = [run.label, ranks, *(figure_cell(run, column) for column in COMPARED), state]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
