"""The cache: made once, by one of many processes, and never read half-made."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from datamodules.cache import cache_key, cache_root, cached_folder

SPAWN = multiprocessing.get_context("spawn")


def build(partial: Path) -> None:
    """Leave a mark outside the cache, so that a test can count how often this was called, then take a while."""
    with (partial.parent.parent / "builds").open("a") as builds:
        builds.write("x")
    (partial / "first.bin").write_bytes(b"a" * 1000)
    time.sleep(0.3)
    (partial / "second.bin").write_bytes(b"b" * 10)


def build_for_ever(partial: Path) -> None:
    (partial / "first.bin").write_bytes(b"half")
    time.sleep(600)


def build_and_fail(partial: Path) -> None:
    (partial / "first.bin").write_bytes(b"half")
    raise ValueError("the text is of no use")


def sizes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_size for name in ("first.bin", "second.bin")]


def read_when_all_are_ready(root: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    results.put(sizes(cached_folder(root, "key", build)))  # type: ignore[attr-defined]


def num_builds(tmp_path: Path) -> int:
    return len((tmp_path / "builds").read_text())


def test_four_processes_at_once_build_it_once_and_all_read_it_whole(tmp_path: Path) -> None:
    barrier, results = SPAWN.Barrier(4), SPAWN.Queue()
    arguments = (tmp_path / "cache", barrier, results)
    processes = [SPAWN.Process(target=read_when_all_are_ready, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert seen == [[1000, 10]] * 4
    assert num_builds(tmp_path) == 1


def test_what_a_killed_builder_left_is_never_read_and_swept_up(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    for key in ("key", "other"):
        builder = SPAWN.Process(target=cached_folder, args=(root, key, build_for_ever))
        builder.start()
        while not (root / f"{key}.partial" / "first.bin").exists():
            time.sleep(0.01)
        os.kill(builder.pid or 0, signal.SIGKILL)
        builder.join()
        assert (root / f"{key}.partial").exists()
    assert sizes(cached_folder(root, "key", build)) == [1000, 10]
    assert not list(root.glob("*.partial"))


def test_the_folder_of_a_living_builder_is_not_swept_up(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    builder = SPAWN.Process(target=cached_folder, args=(root, "other", build_for_ever))
    builder.start()
    while not (root / "other.partial" / "first.bin").exists():
        time.sleep(0.01)
    cached_folder(root, "key", build)
    survived = (root / "other.partial" / "first.bin").exists()
    builder.kill()
    builder.join()
    assert survived


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the text is of no use"):
        cached_folder(tmp_path, "key", build_and_fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("damage", ["truncate", "delete", "inventory"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    folder = cached_folder(tmp_path / "cache", "key", build)
    cached_folder(tmp_path / "cache", "key", build)
    assert num_builds(tmp_path) == 1
    match damage:
        case "truncate":
            os.truncate(folder / "first.bin", 999)
        case "delete":
            (folder / "second.bin").unlink()
        case "inventory":
            (folder / "inventory.json").write_text("{")
    assert sizes(cached_folder(tmp_path / "cache", "key", build)) == [1000, 10]
    assert num_builds(tmp_path) == 2


def test_an_unwritable_cache_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"^data\.cache_dir='.*/file/cache' cannot be written \(.+\); give a folder"):
        cached_folder(tmp_path / "file" / "cache", "key", build)


def test_settings_that_differ_have_keys_that_differ() -> None:
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root(None) == Path("/x/concord")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_root(None) == Path("/h/.cache/concord")
    assert cache_root("~/c") == Path("/h/c")
