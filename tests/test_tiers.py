"""How the tests are kept: what they share is in modules of its own, and `make prove` leaves none of them out."""

import ast
import re
from pathlib import Path

from tests.launch.command import REPOSITORY

TESTS = REPOSITORY / "tests"
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    whole = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    parts = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return whole | {f"{node.module}.{name.name}" for node in parts for name in node.names}


def test_no_module_imports_a_test_module() -> None:
    found = {(path.name, name) for path in TESTS.rglob("*.py") for name in imported(path) if ".test_" in name}
    assert found == set()


def test_every_test_is_in_one_part_of_make_prove() -> None:
    """The parts are chosen by marks; together they are everything, and none is there twice."""
    everyday, *parts = re.findall(r"-m pytest.* -m '?([a-z() ]+?)'?$", MAKEFILE, flags=re.MULTILINE)
    assert len(parts) == 2
    for marks in (set[str](), {"full"}, {"matrix"}, {"alone"}, {"full", "alone"}, {"full", "matrix"}):
        names = {name: name in marks for name in ("full", "matrix", "alone")}
        assert sum(eval(part, {}, names) for part in parts) == 1, marks
        assert eval(everyday, {}, names) == (not marks)
