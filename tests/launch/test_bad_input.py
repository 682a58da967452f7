"""Every mistake of a user's gets one line with key, value and fix, a non-zero exit, and starts no process."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.command import REPOSITORY, TINY, user_environment
from tests.launch.warm import train

NO_BLOCKS = ["model=vit_tiny", "data=digits", "model._target_=tests.strategies.own_models.DropsOut"]

MISTAKES = {
    "unknown preset": (["strategy=zero9"], ["zero9", "single"]),
    "unknown key": (["trainer.max_step=3"], ["trainer.max_step:", "did you mean trainer.max_steps?"]),
    "unknown added key": (["+trainer.max_step=3"], ["trainer.max_step=3", "no such key", "trainer.max_steps?"]),
    "unknown added strategy key": (["strategy=ddp", "+strategy.bucket=3"], ["strategy.bucket=3", "no such key"]),
    "negative count": (["trainer.max_steps=-3"], ["trainer.max_steps", "greater than 0", "-3"]),
    "count that is no integer": (["trainer.max_steps=2.5"], ["trainer.max_steps", "2.5"]),
    "negative count of a net": (["model.net.num_layers=-1"], ["model.net.num_layers", "-1"]),
    "word for a count": (["data.global_batch_size=many"], ["data.global_batch_size", "many"]),
    "devices that are none": (["launcher.devices=0"], ["launcher.devices", "0"]),
    "batch that does not divide": (
        ["strategy=ddp", "launcher.devices=2", "data.global_batch_size=20", "data.micro_batch_size=4"],
        ["data.global_batch_size=20", "16 or 24", "data.micro_batch_size=2"],
    ),
    "mesh that does not fit": (
        ["strategy=ddp", "launcher.devices=2", "strategy.mesh.data=4"],
        ["launcher.devices=2", "4"],
    ),
    "axis that ddp has not": (
        ["strategy=ddp", "+strategy.mesh.tensor=2", "launcher.devices=2"],
        ["strategy.mesh.tensor=2"],
    ),
    "no GPU": (["launcher.accelerator=gpu"], ["launcher.accelerator=gpu", "launcher.accelerator=cpu"]),
    "precision that a CPU cannot do": (["precision=fp16"], ["precision=fp16", "precision=bf16"]),
    "data that do not go with the model": (["model=vit_tiny"], ["image_size", "data=text"]),
    "vocabulary too small": (["model.net.vocab_size=100"], ["model.net.vocab_size=100", "256"]),
    "missing data file": (["data.files='nowhere/*.txt'"], ["data.files", "nowhere/*.txt"]),
    "empty data file": (["data.files=empty.txt"], ["empty.txt"]),
    "text shorter than one sample": (["data.files=short.txt"], ["data.sequence_length", "give more text"]),
    "binary rubbish as text": (["data.files=rubbish.txt"], ["rubbish.txt"]),
    "run folder under a file": (["run_dir=empty.txt/run"], ["empty.txt/run", "cannot be written"]),
    "run folder that holds another run": (["run_dir=taken"], ["run_dir", "taken", "already holds another run"]),
    "mandatory value left out": (["data=idx", "model=vit_tiny"], ["data.folder"]),
    "learning rate that is no number": (["optimizer.lr=abc"], ["optimizer.lr", "abc"]),
    "negative warm-up": (["scheduler.warmup_steps=-2"], ["scheduler.warmup_steps", "-2"]),
    "endless timeout": (["launcher.timeout_s=inf"], ["launcher.timeout_s", "inf"]),
    "no time to start": (["launcher.startup_timeout_s=0"], ["launcher.startup_timeout_s", "0"]),
    "seed that does not fit": (["seed=99999999999"], ["seed", "99999999999"]),
    "group without a choice": (["model=null"], ["group"]),
    "pattern that names no file": (["data.files=/"], ["data.files=/", "books/*.txt"]),
    "plan that lacks what the strategy needs": (
        ["strategy._target_=tests.strategies.needy.NeedsTensor", "model._target_=tests.launch.failing.CannotBeSplit"],
        ["model=CannotBeSplit", "plan.tensor", "another strategy"],
    ),
    "blocks to compute again that the plan does not name": (
        [*NO_BLOCKS, "strategy.activation_checkpointing=full"],
        ["strategy.activation_checkpointing=full", "model=vit_tiny", "no plan.blocks", "DropsOut"],
    ),
    "blocks to compile that the plan does not name": (
        [*NO_BLOCKS, "compile=true"],
        ["compile=true", "model=vit_tiny", "no plan.blocks", "leave the key out"],
    ),
    "activation checkpointing by a wrong word": (
        ["strategy=ddp", "strategy.activation_checkpointing=maybe"],
        ["strategy.activation_checkpointing", "'none' or 'full'", "every_", "(got 'maybe')"],
    ),
    "compile that is neither true nor false": (["compile=blocks"], ["compile", "blocks"]),
    "nothing between compiled modules": (["debug=nan", "compile=true"], ["leave compile=true out"]),
    "one rank that sends nothing": (["debug=flight_recorder"], ["strategy=single has one"]),
    "debugging that there is not": (["debug=nans"], ["debug/nans"]),
    "profile beyond the run's end": (
        ["profile=torch", "trainer.max_steps=15"],
        ["end beyond trainer.max_steps=15; set"],
    ),
    "no step to warm up in": (["profile=torch", "profile.first_step=1"], ["set profile.first_step=2."]),
    "no CUDA allocator": (["profile=memory"], ["on CPU choose profile=torch profile.memory=true."]),
    "profile of no step": (["profile=torch", "profile.steps=0"], ["profile.steps", "greater than 0 (got 0)"]),
    "sweep folder that is none": (["resume_sweep=taken"], ["resume_sweep=taken"]),
}


@pytest.mark.full
def test_compiling_without_a_compiler_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, *TINY, "compile=true", CXX="/nowhere/c++")
    assert run.returncode == 2
    assert "compile=true needs a C++ compiler, and '/nowhere/c++' is not there" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Too short for validation.")
    (tmp_path / "rubbish.txt").write_bytes(gzip.compress(os.urandom(4096)))
    (tmp_path / "taken/ranks").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_line_and_starts_nothing(mistake: str, folder: Path) -> None:
    overrides, words = MISTAKES[mistake]
    defaults = [] if any(word.startswith("run_dir=") for word in overrides) else ["run_dir=run"]
    keys = {word.partition("=")[0].lstrip("+") for word in overrides}
    tiny = [word for word in TINY if word.partition("=")[0] not in keys]
    if "resume_sweep" in keys:
        tiny, defaults = [], []
    if {"model", "data"} & keys:
        tiny = [word for word in tiny if not word.startswith(("model.", "data."))]
    run = train(folder, *tiny, *overrides, *defaults)
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert run.returncode == 2
    assert len(lines) == 1, run.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert run.stdout.strip() == ""
    assert not list(folder.glob("**/*.log"))
    assert not (folder / "run").exists()


def test_all_jobs_of_a_sweep_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.max_steps=4", "-m", "seed=1,x", "strategy=single,ddp")
    assert run.returncode == 2
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("job 2 (seed=x strategy=single): seed: Input should be a valid integer")
    assert line.endswith("2 of 4 jobs cannot go; none was started.")
    assert run.stdout.strip() == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_mistake_that_every_trial_of_a_search_would_make_is_told_once(tmp_path: Path) -> None:
    run = train(tmp_path, "-m", "hparams=lr", "data.global_batch_size=0")
    assert run.returncode == 2
    assert "data.global_batch_size" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_what_has_no_effect_is_told_in_the_first_line(tmp_path: Path) -> None:
    run = train(tmp_path, *TINY, "trainer.max_steps=1", "launcher.devices=10000", "run_dir=run")
    assert run.returncode == 0
    first = run.stdout.splitlines()[0]
    assert "; of launcher.devices=10000, strategy=single uses 1" in first
    assert "; scheduler.warmup_steps=20 do not end before trainer.max_steps=1" in first


@pytest.mark.full
def test_own_file_that_cannot_be_imported_is_told_by_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import nosuchthing\nfrom models.language import LanguageModel as Mine\n")
    run = train(tmp_path, *TINY, "model._target_=mine.Mine", "run_dir=run")
    assert run.returncode == 2
    told = "model: its code raised ModuleNotFoundError: No module named 'nosuchthing' (mine.py:1)"
    assert run.stderr.splitlines() == [told]


@pytest.mark.full
def test_scripts_say_what_they_do_and_word_mistakes(tmp_path: Path) -> None:
    for name, words in (("verify", []), ("bench", ["overhead"]), ("compare", []), ("convert", [])):
        run = script(tmp_path, name, *words, "--help")
        assert run.returncode == 0, run.stderr
        assert f"python scripts/{name}.py" in run.stdout
    for words, said in (
        (["overhead", "trainer.max_stps=3"], "trainer.max_steps?"),
        (["overhed"], "choose one of overhead"),
    ):
        run = script(tmp_path, "bench", *words)
        assert run.returncode == 2
        assert said in run.stderr
        assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.full
@pytest.mark.parametrize("command", [["train.py"], ["scripts/verify.py"], ["scripts/convert.py"]])
def test_python_without_our_packages_is_told_to_activate_the_environment(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / command[0])], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    (line,) = run.stderr.strip().splitlines()
    assert "has no hydra: activate Concord's environment first, by `. .venv/bin/activate`" in line


def script(cwd: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / f"scripts/{name}.py"), *words]
    return subprocess.run(
        command, cwd=cwd, env=user_environment(), capture_output=True, text=True, timeout=120, check=False
    )
