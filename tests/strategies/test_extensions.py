"""C++ extensions are built once, whoever else builds, died building, or lacks what a build needs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from strategies.engines.extensions import Extension, ensure_built, machine_origin, make
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TAKE_LOCK = "import os, sys, time; fd = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('taken', flush=True); "


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.engines.extensions._POLL_S", 0.2)
    monkeypatch.setattr("strategies.engines.extensions._PATIENCE_S", 0.3)


def fake(root: Path, then: str = "") -> Extension:
    """An extension whose build takes no compiler: it notes itself in `root/builds` and writes its library."""
    folder = root / "fake"
    program = f"import pathlib, time; open({str(root / 'builds')!r}, 'a').write('x')\n{then}\n"
    program += f"pathlib.Path({str(folder / 'fake.so')!r}).write_text('code')\n"
    return Extension(title="a fake", minutes=1, folder=folder, program=program, origin={"torch": "1"})


def num_builds(root: Path) -> int:
    return len((root / "builds").read_text())


@contextmanager
def lock_taker(extension: Extension, then: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has taken torch's lock, as one that builds by torch alone."""
    extension.folder.mkdir(parents=True)
    line = [sys.executable, "-c", TAKE_LOCK + then, str(extension.baton)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        try:
            yield process
        finally:
            process.kill()


def test_extension_is_built_once_with_a_line_before_and_after(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    make(fake(tmp_path))
    before, after = capfd.readouterr().out.splitlines()
    assert before.startswith("building a fake with ")
    assert after.startswith("built a fake in ")
    make(fake(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert num_builds(tmp_path) == 1


def test_other_torch_or_other_library_is_built_anew_from_nothing(tmp_path: Path) -> None:
    extension = fake(tmp_path)
    make(extension)
    (extension.folder / "fake.o").write_text("of the old torch")
    make(replace(extension, origin={"torch": "2"}))
    assert num_builds(tmp_path) == 2
    assert not (extension.folder / "fake.o").exists()
    extension.library.write_text("built by a DeepSpeed of its own")
    make(replace(extension, origin={"torch": "2"}))
    assert num_builds(tmp_path) == 3


@pytest.mark.parametrize("already_built", [False, True])
def test_lock_of_a_killed_process_is_removed(tmp_path: Path, capfd: pytest.CaptureFixture, already_built: bool) -> None:
    extension = fake(tmp_path)
    with lock_taker(extension, "time.sleep(60)") as process:
        process.kill()
    if already_built:
        extension.baton.unlink()
        make(extension)
        extension.baton.touch()
    make(extension)
    assert f"removed {extension.baton}, which a killed build left\n" in capfd.readouterr().out
    assert not extension.baton.exists()
    assert num_builds(tmp_path) == 1


def test_lock_of_a_live_process_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    extension = fake(tmp_path)
    with lock_taker(extension, "time.sleep(1); os.remove(sys.argv[1])") as process:
        start = time.monotonic()
        make(extension)
        assert time.monotonic() - start > 0.8
    out = capfd.readouterr().out
    assert f"waiting for process {process.pid} (python" in out
    assert "removed" not in out
    assert num_builds(tmp_path) == 1


def test_compiler_that_outlived_its_build_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    extension = fake(tmp_path)
    extension.folder.mkdir()
    extension.baton.touch()
    with subprocess.Popen(["sleep", "1"], cwd=extension.folder) as process:
        make(extension)
        assert process.poll() is not None
    waiting, removed, *_ = capfd.readouterr().out.splitlines()
    assert waiting.startswith(f"waiting for process {process.pid} (sleep)")
    assert removed.startswith("removed ")


def test_of_two_callers_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "ranks", make, fake(tmp_path, then="time.sleep(1.5)"))
    assert num_builds(tmp_path) == 1
    logs = sorted((tmp_path / "ranks" / f"rank{rank}.log").read_text() for rank in range(2))
    assert logs[0].startswith("building a fake")
    assert logs[1].startswith("waiting for process ")
    assert logs[1].count("\n") == 1


def test_failed_build_names_its_first_error_and_its_log(tmp_path: Path) -> None:
    extension = fake(
        tmp_path, then="print('x.cpp:1: error: no such thing'); print('ninja: stopped'); raise SystemExit(1)"
    )
    with pytest.raises(RuntimeError, match=r"^a fake could not be built: x\.cpp:1: error: no such thing; ") as failure:
        make(extension)
    assert str(extension.log) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not extension.stamp.exists()


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


@pytest.mark.usefixtures("nothing_built")
class TestMissing:
    """What a build lacks is said before it starts."""

    def test_compiler_that_is_nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/nowhere/c++")
        with pytest.raises(ValueError, match=r"cpu_adam .*'/nowhere/c\+\+' is not there: apt install g\+\+"):
            ensure_built(["cpu_adam"])

    def test_compiler_when_path_is_empty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CXX", raising=False)
        stub(tmp_path / "bin" / "ninja", "exit 0")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        with pytest.raises(ValueError, match=r"'c\+\+' is not there: apt install g\+\+"):
            ensure_built(["cpu_adam"])

    def test_ninja(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        with pytest.raises(ValueError, match=r"cpu_adam: building and loading need ninja: pip install ninja$"):
            ensure_built(["cpu_adam"])

    def test_libaio(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
        without_libaio = stub(tmp_path / "bin" / "g++", 'case "$*" in *-laio*) exit 1;; esac')
        monkeypatch.setenv("CXX", str(without_libaio))
        with pytest.raises(ValueError, match=r"^zero3_nvme needs libaio: apt install libaio-dev \(or dnf install"):
            ensure_built(["cpu_adam", "async_io"])
        assert capfd.readouterr().out == ""

    def test_cuda_toolkit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
        with pytest.raises(ValueError, match=r"^zero3_nvme on a GPU needs the CUDA toolkit"):
            ensure_built(["async_io"])

    def test_folder_that_can_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
        with pytest.raises(ValueError, match=r"file/cpu_adam cannot be written .*set TORCH_EXTENSIONS_DIR"):
            ensure_built(["cpu_adam"])

    def test_op(self) -> None:
        with pytest.raises(ValueError, match="'gpu_adam' is not known here; choose from async_io, cpu_adam"):
            ensure_built(["gpu_adam"])

    def test_command_line_says_one_line_and_fails(self, tmp_path: Path) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "strategies.engines.extensions", "cpu_adam"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CXX": "/nowhere/c++"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("DeepSpeed's cpu_adam ")
        assert ended.stderr.count("\n") == 1


def stub(path: Path, script: str) -> Path:
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.full
def test_build_that_is_killed_half_way_leaves_nothing_that_stops_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension = tiny(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(endless_compiler(tmp_path)))
        builder = get_context("fork").Process(target=make, args=(extension,))
        builder.start()
    compilers = compiling(extension.folder, within_s=60)
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert psutil.wait_procs(compilers, timeout=5)[1] == []  # they end with the process that wanted them
    assert extension.baton.exists()
    make(extension)
    assert f"removed {extension.baton}" in capfd.readouterr().out
    assert "answer 42" in extension.log.read_text()


@pytest.mark.full
def test_build_that_is_interrupted_takes_its_lock_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = tiny(tmp_path)
    monkeypatch.setenv("CXX", str(endless_compiler(tmp_path)))
    builder = get_context("fork").Process(target=make, args=(extension,))
    builder.start()
    compilers = compiling(extension.folder, within_s=60)
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGINT)
    builder.join()
    assert psutil.wait_procs(compilers, timeout=5)[1] == []
    assert not extension.baton.exists()


def endless_compiler(root: Path) -> Path:
    return stub(root / "bin" / "g++", 'case "$*" in *" -c "*) sleep 600;; *) exec c++ "$@";; esac')


def tiny(root: Path) -> Extension:
    """An extension that torch really builds."""
    source, folder = root / "tiny.cpp", root / "tiny"
    source.write_text(
        "#include <pybind11/pybind11.h>\n"  # torch's own headers would take a minute
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("answer", [] { return 42; }); }\n'
    )
    program = (
        "from torch.utils.cpp_extension import load\n"
        f"module = load('tiny', [{str(source)!r}], build_directory={str(folder)!r}, verbose=True)\n"
        "print('answer', module.answer())\n"
    )
    return Extension(title="tiny", minutes=1, folder=folder, program=program, origin=machine_origin())


def compiling(folder: Path, within_s: float) -> list[psutil.Process]:
    """The compilers that ninja has started in `folder`, once it has."""
    deadline = time.monotonic() + within_s
    found: list[psutil.Process] = []
    while not found:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name() == "sleep" and process.cwd() == str(folder):
                    found.append(process)
    return found
