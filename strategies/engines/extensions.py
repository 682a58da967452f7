"""DeepSpeed's C++ extensions, built once for all processes of a user, and never waited for in vain.

torch.utils.cpp_extension compiles them on first use: minutes without a word, while a file `lock` in the extension's
folder holds off everybody else. A build that is killed leaves that file, and every later load waits on it for ever.
Nor does torch record in the folder which torch a library was compiled against. `ensure_built` mends both.

`python -m strategies.engines.extensions async_io cpu_adam` does the same from the command line.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

_POLL_S = 0.5
_PATIENCE_S = 1.0  # a rank that only loads holds torch's lock for a tenth of that: not worth a line

# Somebody who looks at the folder, rather than builds in it.
_SHELLS = frozenset({"bash", "dash", "fish", "sh", "tcsh", "zsh"})

# Comes before an extension's program: when its parent is gone, it ends itself and ninja. By SIGTERM, which ninja passes
# on: each of its compilers is in a group of its own, and would outlive a SIGKILL by minutes.
_LIFELINE = """
import os, signal, sys, threading, time
def watch(parent=int(sys.argv[1])):
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
"""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One of DeepSpeed's ops: its builder's class, its use, how long it builds, and the ops that it loads first."""

    builder: str
    purpose: str
    minutes: int
    after: tuple[str, ...] = ()


# Minutes on two idle cores of an Intel Xeon at 2.5 GHz, reckoned from the compiler's CPU time: 61 s for one of the 12
# files of async_io, 76 s for one of the 2 of cpu_adam. Beside other work: async_io 592 s, cpu_adam 206 s, pin_memory
# 116 s (g++ 12.2, DeepSpeed 0.19.8).
OPS = {
    "async_io": Op(builder="AsyncIOBuilder", purpose="NVMe offload", minutes=6, after=("pin_memory",)),
    "cpu_adam": Op(builder="CPUAdamBuilder", purpose="an optimizer on the CPU", minutes=2),
    "pin_memory": Op(builder="PinMemoryBuilder", purpose="the buffers of async_io", minutes=1),
}


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A library that torch.utils.cpp_extension builds in `folder`; `program` is Python that builds and loads it."""

    title: str
    minutes: int
    folder: Path
    program: str
    origin: dict[str, str]  # what has to be the same for the library to be loaded as it is

    @property
    def library(self) -> Path:
        return self.folder / f"{self.folder.name}.so"

    @property
    def baton(self) -> Path:
        """torch's lock: whoever has made this file builds or loads, whoever finds it waits until it is gone."""
        return self.folder / "lock"

    @property
    def log(self) -> Path:
        return self.folder / "build.log"

    @property
    def stamp(self) -> Path:
        return self.folder / "concord.json"


def ensure_built(names: Sequence[str]) -> None:
    """Build those of DeepSpeed's ops `names` that are not there yet; afterwards every process of this user loads them.

    Prints a line before and after each build, and one if it waits for another process or removes what a killed one
    left; nothing if all is there. Puts ninja's folder on this process's PATH if it is missing there, since loading
    needs it too. A builder in another container or on another machine that shares the folder is seen only if it came
    this way, not if it is a DeepSpeed of its own.

    Raises:
        ValueError: an unknown name; no ninja, compiler, Python headers or libaio; a folder that cannot be written.
        RuntimeError: a build failed; names its log.
    """
    unknown = sorted(set(names) - OPS.keys())
    if unknown:
        raise ValueError(f"DeepSpeed's op {unknown[0]!r} is not known here; choose from {', '.join(sorted(OPS))}.")
    wanted = dict.fromkeys(name for asked in names for name in (*OPS[asked].after, asked))
    check_ninja(f"DeepSpeed's {', '.join(names)}")
    try:
        extensions = [deepspeed_extension(name) for name in wanted]
        absent = [extension for extension in extensions if not is_current(extension)]
        if absent:
            check_compiler(absent[0].title)
        if "async_io" in wanted:
            check_cuda()
            check_libaio()
        for extension in extensions:
            make(extension)
    except OSError as error:
        raise ValueError(
            f"{error.filename or 'the folder for C++ extensions'} cannot be written ({error.strerror or error}); "
            f"set TORCH_EXTENSIONS_DIR to a folder that can"
        ) from None


def deepspeed_extension(name: str) -> Extension:
    """One of OPS as an extension of this Python, torch and DeepSpeed; makes its folder."""
    deepspeed = importlib.util.find_spec("deepspeed")
    assert deepspeed is not None
    return Extension(
        title=f"DeepSpeed's {name} ({OPS[name].purpose})",
        minutes=OPS[name].minutes,
        # Private, but the one place that knows torch's naming, which has changed between its versions.
        folder=Path(cpp_extension._get_build_directory(name, verbose=False)).absolute(),
        program=(
            "from deepspeed.accelerator import get_accelerator\n"
            f"get_accelerator().create_op_builder({OPS[name].builder!r}).load(verbose=True)\n"
        ),
        origin={
            **machine_origin(),
            "deepspeed": f"{importlib.metadata.version('deepspeed')} at {deepspeed.origin}",
            "accelerator": os.environ.get("DS_ACCELERATOR", ""),  # each has builders, thus flags, of its own
        },
    )


def machine_origin() -> dict[str, str]:
    """What a compiled extension depends on, whatever its source.

    torch's include folder is in every compile command, so ninja itself builds anew for another virtual environment;
    it does not for a torch that was replaced in place by files with older dates. `-march=native` code from another
    processor dies of SIGILL, as in a home folder that several machines share.
    """
    return {
        "python": str(sysconfig.get_config_var("EXT_SUFFIX")),
        "torch": f"{torch.__version__} at {torch.__file__}",
        "compiler": shlex.join(compiler()),
        "processor": processor(),
    }


def processor() -> str:
    """A digest of the instruction sets that this machine's processor has."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
    return ""


def compiler() -> list[str]:
    """The C++ compiler that torch calls."""
    return shlex.split(os.environ.get("CXX", "c++"))


def check_ninja(needer: str) -> None:
    """Have `ninja` on PATH, where torch looks for it before each build and load; ValueError if it is nowhere."""
    if shutil.which("ninja") is None:
        scripts = sysconfig.get_path("scripts")  # an environment's python may run without its activation
        if shutil.which("ninja", path=scripts) is None:
            raise ValueError(f"{needer}: building and loading need ninja: pip install ninja")
        os.environ["PATH"] = os.pathsep.join(filter(None, [scripts, os.environ.get("PATH")]))


def check_compiler(needer: str) -> None:
    """ValueError unless a C++ program can be compiled and linked, and Python's headers are there."""
    command = shlex.join(compiler())
    if not links(compiler(), "#include <vector>\nint main() { return 0; }\n"):
        fault = "compiles no program" if shutil.which(command.split(" ")[0]) else "is not there"
        raise ValueError(
            f"{needer} needs a C++ compiler, and {command!r} {fault}: "
            f"apt install g++ (or dnf install gcc-c++), or set CXX to one"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise ValueError(f"{needer} needs Python's headers: apt install python3-dev (or dnf install python3-devel)")


def check_libaio() -> None:
    """ValueError unless the build finds libaio, and DeepSpeed, which asks the C compiler at every load, does too."""
    source = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
    if not links(compiler(), source, "-laio"):
        raise ValueError("zero3_nvme needs libaio: apt install libaio-dev (or dnf install libaio-devel)")
    # OpBuilder.has_function, by way of distutils: this compiler, these two variables.
    c_compiler = os.environ.get("CC", str(sysconfig.get_config_var("CC")))
    flags = [flag for name in ("CFLAGS", "LDFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    if not links([*shlex.split(c_compiler), "-x", "c"], source, *flags, "-laio"):
        raise ValueError(f"zero3_nvme needs a C compiler that finds libaio, and {c_compiler!r} does not: set CC=gcc")


def check_cuda() -> None:
    """ValueError if there is a GPU but no CUDA toolkit: AsyncIOBuilder then joins its include folder to None."""
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or torch.version.hip is not None
    if torch.cuda.is_available() and not on_cpu and cpp_extension.CUDA_HOME is None:
        raise ValueError("zero3_nvme on a GPU needs the CUDA toolkit: install it, or set CUDA_HOME to where it is")


def links(command: Sequence[str], source: str, *flags: str) -> bool:
    """Whether the compiler `command` makes a program of `source`; nothing else tells a header or library for sure."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "probe.cpp")
        file.write_text(source)
        line = [*command, str(file), "-o", str(file.with_suffix("")), *flags]
        with suppress(FileNotFoundError, PermissionError):
            return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
        return False


def is_current(extension: Extension) -> bool:
    """Whether the library is there, and is the very file that was stamped with this origin."""
    try:
        return extension.stamp.read_text(encoding="utf-8") == stamp(extension)
    except FileNotFoundError:
        return False


def stamp(extension: Extension) -> str:
    status = extension.library.stat()  # a DeepSpeed of its own may have built anew: its library is not what we stamped
    return json.dumps({**extension.origin, "library": [status.st_size, status.st_mtime_ns]}, indent=2) + "\n"


def make(extension: Extension) -> None:
    """Build the extension unless it is current; of several callers one builds, and the others wait for it.

    Raises RuntimeError, naming the log, if the build fails.
    """
    if is_current(extension) and not extension.baton.exists():
        return
    extension.folder.mkdir(parents=True, exist_ok=True)
    with turn(extension):
        baton = take_baton(extension)
        try:
            if is_current(extension):
                return
            clear(extension)
        finally:
            baton.release()
        build(extension)


@contextmanager
def turn(extension: Extension) -> Iterator[None]:
    """This process alone among those that come this way; the kernel ends it with the process."""
    lock = FileLock(extension.folder.with_name(f"{extension.folder.name}.concord-lock"))
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        holders = [process for process in others() if opened_by(process, Path(lock.lock_file))]
        print(f"waiting for {described(holders)} to build {extension.title}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def take_baton(extension: Extension) -> FileBaton:
    """Hold torch's lock: wait while its maker lives, remove it when that one is dead."""
    baton = FileBaton(str(extension.baton))
    patience = time.monotonic() + _PATIENCE_S
    suspect: tuple[int, int] | None = None
    while True:
        if found := builders(extension):
            suspect = None
            if time.monotonic() > patience:
                patience = float("inf")
                print(f"waiting for {described(found)}, at work in {extension.folder}", flush=True)
        elif baton.try_acquire():
            return baton
        elif (seen := identity(extension.baton)) == suspect and seen is not None:
            extension.baton.unlink(missing_ok=True)
            print(f"removed {extension.baton}, which a killed build left", flush=True)
        else:
            # Between closing and removing it a live process has it no longer open: only a second look can tell.
            suspect = seen
        time.sleep(_POLL_S)


def identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of a file: another of the same name has others; None if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def others() -> Iterator[psutil.Process]:
    return (process for process in psutil.process_iter() if process.pid != os.getpid())


def builders(extension: Extension) -> list[psutil.Process]:
    """Live processes that hold torch's lock, or, like ninja and its compilers, work in the extension's folder."""
    return [process for process in others() if works_in(process, extension.folder) or holds(process, extension.baton)]


def works_in(process: psutil.Process, folder: Path) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return Path(process.cwd()).is_relative_to(folder) and process.name() not in _SHELLS
    return False


def holds(process: psutil.Process, baton: Path) -> bool:
    """Whether `process` has made `baton`; another user's cannot be looked into, so its ninja is taken for one."""
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        owner = baton.stat().st_uid
        if opened_by(process, baton):
            return True
        foreign = owner != os.getuid() and os.getuid() != 0
        return foreign and process.uids().real == owner and process.name().startswith("ninja")
    return False


def opened_by(process: psutil.Process, path: Path) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(Path(file.path) == path for file in process.open_files())
    return False


def described(processes: Sequence[psutil.Process]) -> str:
    names = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            names.append(f"process {process.pid} ({process.name()})")
    return " and ".join(names) or "another process"


def clear(extension: Extension) -> None:
    """Remove all but torch's lock: ninja would keep what it takes for current by its dates."""
    for path in extension.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != extension.baton:
            path.unlink()


def build(extension: Extension) -> None:
    """Run the extension's program in a process of its own, its output in the log; then stamp the library."""
    print(f"building {extension.title} with {compiler()[0]}, once; about {extension.minutes} min", flush=True)
    start = time.monotonic()
    with extension.log.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _LIFELINE + extension.program, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # with ninja, to be ended together
        )
        try:
            code = child.wait()
        finally:
            if child.poll() is None:  # we were interrupted
                orphaned = holds(psutil.Process(child.pid), extension.baton)
                os.killpg(child.pid, signal.SIGTERM)  # see _LIFELINE
                child.wait()
                if orphaned:
                    extension.baton.unlink(missing_ok=True)
    if code or not extension.library.is_file():
        fault = cause(extension.log, code)
        raise RuntimeError(f"{extension.title} could not be built: {fault}; the whole output is in {extension.log}")
    extension.stamp.write_text(stamp(extension), encoding="utf-8")
    print(f"built {extension.title} in {time.monotonic() - start:.0f} s", flush=True)


def cause(log: Path, code: int) -> str:
    """The line of a failed build's log that says most: the compiler's first error, else the last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror: |undefined reference", line)]
    end = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return (errors[:1] or lines[-1:] or [end])[0] if code >= 0 else end


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m strategies.engines.extensions", description=ensure_built.__doc__)
    parser.add_argument("names", nargs="+", metavar="op", help=", ".join(sorted(OPS)))
    # As an exception it ends the build too, where the signal's default would leave torch's lock behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        ensure_built(parser.parse_args().names)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
