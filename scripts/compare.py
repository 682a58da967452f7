"""Runs side by side: a table here, and one HTML page that needs no network.

python scripts/compare.py <folder of a run or a sweep> ...    writes compare.html there, or here if there are several
python scripts/compare.py <folder> ... --out <page>.html      writes it elsewhere
python scripts/compare.py <folder> ... --png <folder>         the same charts as pictures, too
python scripts/compare.py <folder> ... --loss 2.5             the training loss that times are taken to

Everything is against the run of strategy=single, or the first. Runs that differ by seed alone are repeats: their mean
stands, and a difference that is smaller than their spread is said to be none. What scripts/verify.py has certified
is taken from below runs/.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"compare.py: {message}; see --help.\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("sources", nargs="+", metavar="folder")
    parser.add_argument("--out", type=Path, metavar="PAGE")
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    parser.add_argument("--loss", type=float)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    from tracking.certified import RUNS, certificates_below
    from tracking.comparison import compare_runs
    from tracking.page import write_page
    from tracking.report import print_comparison
    from tracking.sources import collect

    try:
        certificates = certificates_below(RUNS)
        comparison = compare_runs(collect(given.sources), target_loss=given.loss, certificates=certificates)
        print_comparison(comparison)
        out = given.out or Path(given.sources[0] if len(given.sources) == 1 else ".") / "compare.html"
        write_page(comparison, out)
        print(f"wrote {out}")
        if given.png:
            from tracking.pictures import write_pictures

            for path in write_pictures(comparison, given.png):
                print(f"wrote {path}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; give another --out or --png.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
