"""Which code a run is of: git's commit with what differs from it, and a digest of the source of model and data."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
USERS_FOLDERS = ("models", "datamodules", "conf", "recipes")  # where users put files of their own
SOURCES = (".py", ".yaml", ".yml")
OURS = {"datamodules", "hydra_plugins", "launch", "models", "scripts", "strategies", "tracking", "train", "__main__"}
INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
PACKAGES = {"site-packages", "dist-packages"}


def git_revision(root: Path) -> str | None:
    """Commit of the working tree at `root`, with a digest of what differs from it; None outside git.

    Such as 1f0c...-dirty-2b8e61a4. What differs are tracked files, and untracked sources in the folders that are for
    users to put them in.
    """
    # Without this check git would find a repository that merely encloses an unpacked archive of ours.
    if not (root / ".git").exists():
        return None
    try:
        commit = git(root, "describe", "--always", "--abbrev=40", "--exclude=*").decode().strip()
        changed = git(root, "diff", "HEAD")
        added = dict(untracked(root))
    except (OSError, subprocess.SubprocessError):
        return None
    if not changed and not added:
        return commit
    digests = [sha256(changed).hexdigest(), *(f"{name} {digest}" for name, digest in added.items())]
    return f"{commit}-dirty-{sha256(chr(10).join(digests).encode()).hexdigest()[:8]}"


def untracked(root: Path) -> Iterator[tuple[str, str]]:
    """Sources in the users' folders that git has not been told of, and is not told to ignore, with their digests."""
    names = git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *USERS_FOLDERS).decode().split("\0")
    for name in sorted(names):
        if name.endswith(SOURCES):
            yield name, digest_of(root / name)


def git(root: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=10, check=True).stdout


def source_digest(modules: Mapping[str, ModuleType] | None = None) -> str:
    """Twelve hex digits of the source that a run's model and data are made of.

    That is all of models/ and datamodules/, whether git knows of it or not, and of what is imported the files that are
    neither Concord's nor installed. A file counts by its module's name, wherever it lies.
    """
    files = {str(path.relative_to(ROOT)): path for name in ("models", "datamodules") for path in python_files(name)}
    files |= dict(users_files(sys.modules if modules is None else modules))
    lines = [f"{name} {digest_of(path)}" for name, path in sorted(files.items())]
    return sha256("\n".join(lines).encode()).hexdigest()[:12]


def python_files(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def users_files(modules: Mapping[str, ModuleType]) -> Iterator[tuple[str, Path]]:
    """Names and files of imported modules that are the user's own."""
    for name, module in list(modules.items()):
        top = name.partition(".")[0]
        # What an installed package makes and imports, such as torch.compile's kernels, is none of the user's.
        whole = file_of(modules.get(top)) or file_of(module)
        path = file_of(module)
        if top not in OURS and whole is not None and path is not None and not is_installed(whole):
            yield name, path


def file_of(module: ModuleType | None) -> Path | None:
    """The Python file that a module is of; None of what has none, such as a module that is compiled."""
    file = getattr(module, "__file__", None)
    path = Path(file) if isinstance(file, str) and file.endswith(".py") else None
    return path if path is not None and path.is_file() else None


def is_installed(path: Path) -> bool:
    return bool(PACKAGES & set(path.parts)) or not INSTALLED.isdisjoint(path.parents)


def digest_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
