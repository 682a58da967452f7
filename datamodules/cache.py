"""Folders that are made once, by whichever process comes first, and never read half-made."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from datamodules.refused import RefusedError

_INVENTORY = "inventory.json"
_LOG = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """The folder that caches live in: `cache_dir`, or by default the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "concord"


def cache_key(settings: dict[str, Any]) -> str:
    """A file name that differs whenever the settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/key`, filled by `build` unless it is there already and its files have their sizes.

    `build` gets an empty folder beside it, which is renamed when `build` has returned: a reader sees all of it or
    nothing. One process builds while others wait; one that is killed gives up its lock, and what it left is removed.

    Raises:
        ValueError: `root` cannot be written.
    """
    folder = root / key
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with FileLock(root / f"{key}.lock"):
            if not _is_whole(folder):
                _LOG.info("Preparing the data in %s: once, later runs reuse it.", folder)
                _rebuild(folder, build)
    except OSError as error:
        raise RefusedError(
            f"data.cache_dir={str(root)!r} cannot be written ({error.strerror or error}); give a folder that can."
        ) from None
    return folder


def _rebuild(folder: Path, build: Callable[[Path], None]) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        (partial / _INVENTORY).write_text(_inventory(partial), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove what killed builders left: the partial folders whose lock nobody holds."""
    for partial in root.glob("*.partial"):
        with suppress(Timeout), FileLock(partial.with_suffix(".lock"), timeout=0):
            shutil.rmtree(partial, ignore_errors=True)


def _inventory(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.name != _INVENTORY)
    return json.dumps({path.name: path.stat().st_size for path in files}, indent=2) + "\n"


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / _INVENTORY).read_bytes() == _inventory(folder).encode()
    except OSError:
        return False
