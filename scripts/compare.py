"""Runs side by side: a table here, and one HTML page that needs no network.

python scripts/compare.py <folder of a run or a sweep> ...    writes compare.html there, or here if there are several
python scripts/compare.py <folder> ... --out <page>.html      writes it elsewhere
python scripts/compare.py <folder> ... --png <folder>         the same charts as pictures, too
python scripts/compare.py <folder> ... --loss 2.5             the training loss that times are taken to
python scripts/compare.py <folder> ... --wandb                page and certificates to where W&B has the runs, too
python scripts/compare.py <folder> ... --wandb-report         a W&B Report of the runs' group, for the team

wandb:<entity>/<project>/<group> in place of a folder reads the runs of that group (a sweep) from the W&B server.

Everything is against the run of strategy=single, or the first. Runs that differ by seed alone are repeats: their mean
stands, and a difference that is smaller than their spread is said to be none. What scripts/verify.py has certified
is taken from below runs/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.installed import check_installed

check_installed()

if TYPE_CHECKING:
    from tracking.sources import Run

NO_WORKSPACES = "--wandb-report needs wandb-workspaces; do: pip install wandb-workspaces"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"compare.py: {message}; see --help.\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("sources", nargs="+", metavar="folder")
    parser.add_argument("--out", type=Path, metavar="PAGE")
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    parser.add_argument("--loss", type=float)
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--wandb-report", action="store_true")
    return parser.parse_args(arguments)


def page_of(sources: list[str]) -> Path:
    """Where the page goes by default: into the only folder, else here."""
    return (Path(sources[0]) if len(sources) == 1 and Path(sources[0]).is_dir() else Path()) / "compare.html"


def log_comparison(runs: Sequence[Run], page: Path) -> None:
    """Log page and certificates as the runs were logged, and print where they are."""
    from tracking import wandb_comparison
    from tracking.wandb_config import logger_of

    where = wandb_comparison.log_comparison(runs, page, logger_of(runs))
    if where is None:
        raise ValueError("--wandb: W&B does not have these runs, they were made with logger=none.")
    print(where if where.startswith("http") else f"logged offline; upload it by: {where}")


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    from tracking.certified import RUNS, certificates_below
    from tracking.comparison import compare_runs
    from tracking.page import write_page
    from tracking.report import print_comparison
    from tracking.sources import collect

    try:
        if given.wandb_report and find_spec("wandb_workspaces") is None:
            raise ValueError(NO_WORKSPACES)
        runs = collect(given.sources)
        comparison = compare_runs(runs, target_loss=given.loss, certificates=certificates_below(RUNS))
        print_comparison(comparison)
        out = given.out or page_of(given.sources)
        write_page(comparison, out)
        print(f"wrote {out}")
        if given.png:
            from tracking.pictures import write_pictures

            for path in write_pictures(comparison, given.png):
                print(f"wrote {path}")
        if given.wandb:
            log_comparison(runs, out)
        if given.wandb_report:
            from tracking.wandb_config import groups_of
            from tracking.wandb_report import write_report

            print(f"wrote {write_report(comparison, groups_of(given.sources, runs))}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; give another --out or --png.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
