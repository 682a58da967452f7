"""Proves that the tests catch faults: plants each of tests/mutations.py in a copy of the product, where tests turn red.

`make mutants`, or `python -m tests.mutants <names>`. A fault that turns a few tests of a tier red turns it red: so only
those run that are expected to, of `make test` and, where these stay green, of `make prove`, which runs all tests.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from uuid import uuid4

import psutil

from tests.mutations import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[1]
TEST, PROVE = "not full and not matrix and not alone", ""  # the tiers, by the marks of their tests
BEYOND_TEST = 6  # mutants that may be left to `make prove`, which is to catch every one

GREEN, RED, NOTHING_COLLECTED = 0, 1, 5  # pytest's exit codes
TIMEOUT_S = 1200  # many times what the slowest selection takes
MARK, RUN = "CONCORD_MUTANTS", uuid4().hex  # what all processes that are started here have in their environment


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a mutant; `by` is the first test that it turned red, None if there was none."""

    mutant: Mutant
    in_test: bool
    by: str | None
    seconds: float

    @property
    def cells(self) -> list[str]:
        words = ["yes" if self.in_test else "no", "yes" if self.by else "NO"]
        return [self.mutant.name, self.mutant.room, self.mutant.does, *words, f"{self.seconds:.0f}"]


HEADINGS = ["mutant", "room", "what it does", "make test", "make prove", "s"]


def snapshot(folder: Path) -> None:
    """Copy what is tracked or about to be, as it lies in the working tree."""
    words = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.is_symlink() or source.is_file():  # else it is tracked and has been removed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def copy_of(original: Path) -> Iterator[Path]:
    """A copy for one mutant, or none: whatever is done to it goes with it."""
    folder = Path(mkdtemp(dir=original.parent))
    try:
        yield shutil.copytree(original, folder / "concord", symlinks=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def planted(mutant: Mutant, folder: Path) -> str:
    """The mutated source; AssertionError where the product has moved on."""
    source = (folder / mutant.file).read_text()
    count = source.count(mutant.old)
    assert count == 1, f"{mutant.name}: {mutant.file} has {count} times, not once:\n{mutant.old}"
    source = source.replace(mutant.old, mutant.new)
    if mutant.file.endswith(".py"):
        compile(source, mutant.file, "exec")  # else every test would be red, and none would have caught it
    return source


def first_red(folder: Path, selection: str, tier: str) -> str | None:
    """The first red of the selected tests of a tier, where there is one; RuntimeError where they could not be run."""
    mark = f"{RUN}-{uuid4().hex}"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-m", tier]
    words = [sys.executable, "-m", "pytest", *options, f"--basetemp={folder.parent / 'tmp'}", *shlex.split(selection)]
    path = folder.parent / "output"
    try:
        with path.open("w") as output:  # a file: a pipe would be held by a process that is left behind
            code = subprocess.run(
                words,
                cwd=folder,
                env={**os.environ, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                timeout=TIMEOUT_S,
                check=False,
            ).returncode
    finally:
        end_all(mark)
    told = path.read_text(errors="replace")
    if code == GREEN or (code == NOTHING_COLLECTED and tier == TEST):
        return None
    found = re.search(r"^(?:FAILED|ERROR) (tests/\S+::.*?)(?: - |$)", told, re.MULTILINE)
    if code != RED or found is None or "ERROR collecting" in told:
        raise RuntimeError(f"pytest {selection} ended with {code}:\n{told[-4000:]}")
    return found[1]


def end_all(mark: str) -> None:
    """Kill what was started with a mark that begins so, and all that came of it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or gone
            if process.environ().get(MARK, "").startswith(mark):
                process.kill()


def judge(mutant: Mutant, original: Path, *, baseline: bool) -> Outcome:
    began, in_test = time.monotonic(), True
    with copy_of(original) as folder:
        (folder / mutant.file).write_text(planted(mutant, folder))
        by = first_red(folder, mutant.tests, TEST)
        if by is None:
            in_test, by = False, first_red(folder, mutant.tests, PROVE)
    if by and not in_test and baseline:
        check_green([mutant.tests], PROVE, original)
    outcome = Outcome(mutant=mutant, in_test=in_test, by=by, seconds=time.monotonic() - began)
    print(f"{mutant.name}: {by or 'SURVIVES'}  ({outcome.seconds:.0f} s)", flush=True)
    return outcome


def check_green(selections: Sequence[str], tier: str, original: Path) -> None:
    """Tests that are red as it is say nothing of mutants."""
    for selection in selections:
        began = time.monotonic()
        with copy_of(original) as folder:
            red = first_red(folder, selection, tier)
        if red:
            raise RuntimeError(f"{red} is red without a mutant.")
        print(f"without a mutant: {selection}  ({time.monotonic() - began:.0f} s)", flush=True)


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [HEADINGS, *(outcome.cells for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def run(mutants: Sequence[Mutant], *, jobs: int, baseline: bool) -> list[Outcome]:
    """Judge each; however that ends, no process and no file of it is left."""
    with TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as place:
        original = Path(place) / "original"
        snapshot(original)
        for mutant in mutants:
            planted(mutant, original)
        if baseline:
            check_green(list(dict.fromkeys(mutant.tests for mutant in mutants)), TEST, original)
        pool = ThreadPoolExecutor(jobs)
        try:
            return list(pool.map(lambda mutant: judge(mutant, original, baseline=baseline), mutants))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            end_all(RUN)
            pool.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prove that the tests catch faults in the product.")
    parser.add_argument("names", nargs="*", metavar="name", help="mutants to run; all without one")
    parser.add_argument("--list", action="store_true", help="name the mutants, and run none")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="mutants at a time (default 1)")
    baseline = argparse.BooleanOptionalAction
    parser.add_argument("--baseline", action=baseline, default=True, help="first see the tests green without a mutant")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}; see --list")
    return chosen


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    chosen = arguments()
    mutants = [mutant for mutant in MUTANTS if not chosen.names or mutant.name in chosen.names]
    if chosen.list:
        print("\n".join(f"{mutant.name:24}  {mutant.room:20}  {mutant.does}" for mutant in mutants))
        return 0
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, interrupt)
    outcomes = run(mutants, jobs=chosen.j, baseline=chosen.baseline)
    in_test, in_prove = (sum(map(bool, found)) for found in zip(*((o.in_test, o.by) for o in outcomes), strict=True))
    print(f"\n{table(outcomes)}\n")
    print(f"Of {len(outcomes)} mutants, `make test` catches {in_test}, and `make prove` {in_prove}.")
    return int(in_prove < len(outcomes) or in_test < len(outcomes) - BEYOND_TEST)


if __name__ == "__main__":
    sys.exit(main())
