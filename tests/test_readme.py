"""The README tells the truth: its commands run, its links lead somewhere, its tree is the tree."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import models
from launch import preflight
from launch.compose import compose
from launch.job import Job, resolve
from launch.schema import validate
from launch.verify import VERIFY_OVERRIDES, expand
from scripts import bench, compare, convert
from tests.launch.command import REPOSITORY, user_environment

README = (REPOSITORY / "README.md").read_text()

# Two threads that share busy cores with other tests wait for each other most of the time.
ONE_THREAD = "launcher.threads_per_rank=1"
# What makes a documented run short; the rest of the command is as it stands.
SHORT_RUN = [
    "trainer.max_steps=2",
    "trainer.val_every_steps=null",
    "data.max_val_samples=8",
    ONE_THREAD,
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language; "" for those of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def commands_in_prose() -> list[str]:
    """What stands in a sentence or a table: of scripts alone, with words."""
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"`(?:python )?(scripts/\w+\.py\s[^`]+)`", prose)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files that the README tells its reader to add."""
    clone = tmp_path_factory.mktemp("clone") / "concord"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, clone, symlinks=True, ignore=skip)
    for block in [*blocks("python"), *blocks("yaml")]:
        name = re.match(r"# ((?:models|conf)/[\w/]+\.\w+)", block)
        assert name, block
        (clone / name[1]).write_text(block)
    (clone / "books").mkdir()
    (clone / "books/one.txt").write_text("It was the best of times, it was the worst of times. " * 4000)
    return clone


def newest_of(word: str, clone: Path) -> str:
    """A word of a command with the newest folder that it can mean, as a reader of the README who has just run it."""
    key, equals, pattern = word.rpartition("=")
    found = clone.glob(pattern.replace("<day>", "*").replace("<time>", "*"))
    return f"{key}{equals}{max(found)}"


@pytest.fixture
def in_clone(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process find the choices and models of the clone."""
    monkeypatch.setattr("launch.compose.CONFIG_DIR", clone / "conf")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(clone / "models")])


@pytest.mark.usefixtures("in_clone")
@pytest.mark.parametrize(
    "command", [*(command.removeprefix("python ") for command in commands()), *commands_in_prose()]
)
def test_command_is_accepted(command: str) -> None:
    """Whatever is told before processes start is not told of these."""
    program, *words = shlex.split(command)
    if program == "scripts/compare.py":
        compare.parse(words)  # ends the process if it does not understand
    elif program == "scripts/convert.py":
        convert.parse(words)
    elif program == "scripts/bench.py":
        for case in bench.BENCHMARKS[words[0]]:
            accept([*bench.SETTING, *case, *words[1:]])
    else:
        shared = VERIFY_OVERRIDES if program == "scripts/verify.py" else ()
        named = [word for word in words if word != "-m" and "<day>" not in word]  # but for runs that are not here
        for job in expand(named, "-m" in words):
            accept([*shared, *job])


def accept(overrides: list[str]) -> None:
    """What the dispatcher does with a run's overrides before it has data or processes."""
    job = Job.of(resolve(validate(compose([*overrides, "launcher.accelerator=cpu"]))))
    preflight.check(job)


def run(command: str, clone: Path) -> None:
    ended = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=clone, env=user_environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"


def test_the_shortest_path_runs(clone: Path) -> None:
    run(shlex.join([*shlex.split(commands()[0]), *SHORT_RUN, "logger.mode=offline", "data.sequence_length=32"]), clone)


@pytest.mark.full
def test_commands_of_the_readme_run(clone: Path) -> None:
    assert len(commands()) >= 8
    for command in commands():  # in their order: some go on with what others have left
        words = shlex.split(command)
        if "<day>" in command:
            words[-1] = newest_of(words[-1], clone)
        if "verify.py" in command:
            words += ["trainer.max_steps=2", ONE_THREAD]
        elif "train.py" in command and "resume_sweep=" not in command:
            # What the offline client costs each run, the shortest path has shown.
            words += [
                *SHORT_RUN,
                "logger=none",
                *(["trainer.max_steps=3", "data.sequence_length=32"] if "resume=" in command else []),
            ]
        if not any(word in command for word in ("data=", "recipe=", "resume", "compare.py")):
            words += ["data.sequence_length=32"]
        if "data.tokenizer=bpe" in command:
            words += ["data.vocab_size=300"]  # the test's book is a short one
        run(shlex.join(words), clone)


def test_refusal_shown_in_the_readme_is_what_is_printed(tmp_path: Path) -> None:
    (shown,) = blocks("console")
    lines = shown.strip().splitlines()
    for command, expected in zip(lines[::2], lines[1::2], strict=True):
        words = shlex.split(command.removeprefix("$ "))
        run = subprocess.run(
            [sys.executable, str(REPOSITORY / words[1]), *words[2:], "launcher.accelerator=cpu"],
            cwd=tmp_path, env=user_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.stderr.strip() == expected


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_tree_names_every_folder_and_nothing_else() -> None:
    (tree,) = blocks("")
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    folders = {name for name in top if (REPOSITORY / name).is_dir() and not name.startswith(".")}
    assert folders | {"train.py"} == named


def test_strategy_table_names_every_preset() -> None:
    presets = {path.stem for path in (REPOSITORY / "conf/strategy").glob("[!_]*.yaml")}
    table = README.split("## Strategies")[1].split("##")[0]
    assert presets == set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in README


def test_makefile_targets_are_listed_by_help() -> None:
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert [target for target in targets if f"make {target}" not in listed] == []
