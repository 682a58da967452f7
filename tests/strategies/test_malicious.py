"""Files that mean harm: each is refused in one line, at once, and nothing that is in them runs."""

import json
import os
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from safetensors.torch import save_file

from launch.convert import check_targets, convert_from, convert_to
from launch.schema import ConfigError
from strategies.boxes import Box
from strategies.checkpoint import MANIFEST, MANIFEST_BYTES, Manifest, digest, tiles
from strategies.engines.formats import described, read_pickled, to_checkpoint
from strategies.headers import read_header
from strategies.weights import INDEX, check_weights, find_weights, weights_of

TIME_S = 20  # on a busy machine; what is tried here would take minutes, or for ever
WEIGHTS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2)}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of weights, to be tampered with."""
    to_checkpoint(described(WEIGHTS), WEIGHTS.__getitem__, tmp_path / "made")
    return tmp_path / "made"


def refused(call: Callable[[], object], told: str) -> None:
    """It ends in one line, soon, and takes no memory to speak of."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=told) as refusal:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 700
    assert time.monotonic() - start < TIME_S
    assert peak < 50 * 2**20


def read(path: Path) -> None:
    """What a run does with `model.weights`, and `resume` with its checkpoint, before a process starts."""
    check_weights(find_weights(path))


@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w.bin"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_would_run_code_is_not_loaded(name: str, protocol: int, tmp_path: Path) -> None:
    path, mark = tmp_path / name, tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Payload(mark)}, path, pickle_protocol=max(protocol, 2))
    refused(
        lambda: convert_from(path, tmp_path / "out", rename=[]),
        "could run code, and is not loaded .*mkdir|is no plain file of torch.save",
    )
    path.write_bytes(pickle.dumps(Payload(mark), protocol=protocol))
    refused(lambda: convert_from(path, tmp_path / "out", rename=[]), "is not loaded|is no plain file of torch.save")
    refused(lambda: read(path), "is no .safetensors file; convert it first")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have run


def test_pickle_under_the_name_of_safetensors_is_none(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps(Payload(mark))
    (tmp_path / "w.safetensors").write_bytes(content)
    refused(lambda: read(tmp_path / "w.safetensors"), "w.safetensors is damaged .it is no safetensors file")
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / "0.safetensors").write_bytes(content)
    tree["files"]["0.safetensors"] = {"size": len(content), "sha256": digest(folder / "0.safetensors")}
    (folder / MANIFEST).write_text(json.dumps(tree))
    refused(lambda: read(folder), "0.safetensors is damaged .it is no safetensors file")
    assert not mark.exists()


def test_compressed_file_that_unfolds_in_memory_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w/data.pkl", bytes(40 * 2**20))
    refused(lambda: read_pickled(path), "it is compressed")


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (torch.ones(2), "holds no state dict, but Tensor"),
        ({}, "holds no state dict"),
        ({"a": "text"}, "'a' is str, no plain tensor"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is torch.float32, no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' is torch.complex128"),
    ],
    ids=lambda part: str(part)[:12],
)
def test_file_that_is_no_state_dict_says_what_it_is(tree: Any, told: str, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "w.pt")
    refused(lambda: read_pickled(tmp_path / "w.pt"), told)


def deep(tree: dict) -> str:
    return "[" * 200_000


def tampered(change: Callable[[dict], None]) -> Callable[[dict], str]:
    def text(tree: dict) -> str:
        change(tree)
        return json.dumps(tree)

    return text


def piece(tree: dict) -> dict:
    return tree["tensors"]["weight/a"]["pieces"][0]


def elsewhere(name: str) -> Callable[[dict], None]:
    def change(tree: dict) -> None:
        tree["files"][name] = tree["files"].pop("0.safetensors")
        for stored in tree["tensors"].values():
            stored["pieces"][0]["file"] = name

    return change


def overlapping(tree: dict) -> None:
    """As many elements as the whole has, but two of them twice."""
    tree["tensors"]["weight/a"]["pieces"] = [
        {**piece(tree), "start": start, "stop": stop} for start, stop in (([0, 0], [2, 4]), ([1, 0], [2, 4]))
    ]


MANIFESTS: dict[str, tuple[Callable[[dict], str], str]] = {
    "file above the folder": (tampered(elsewhere("../../evil")), "'../../evil' is no plain file name"),
    "absolute file": (tampered(elsewhere("/etc/passwd")), "'/etc/passwd' is no plain file name"),
    "hidden file": (tampered(elsewhere("..")), "'..' is no plain file name"),
    "file that is not listed": (
        tampered(lambda tree: piece(tree).update(file="other")),
        "'other', which is none of its",
    ),
    "negative box": (tampered(lambda tree: piece(tree).update(start=[-1, 0])), "greater than or equal to 0"),
    "box beyond": (tampered(lambda tree: piece(tree).update(stop=[4, 4])), r"\(4, 4\) is none of shape \(3, 4\)"),
    "box of other dims": (tampered(lambda tree: piece(tree).update(start=[0], stop=[3])), "is none of shape"),
    "boxes that overlap": (tampered(overlapping), "'weight/a' are not all of it, each element once"),
    "no boxes": (tampered(lambda tree: tree["tensors"]["weight/a"].update(pieces=[])), "are not all of it"),
    "format": (tampered(lambda tree: tree["tensors"]["weight/a"].update(dtype="load")), "'load' is no format"),
    "size below 0": (
        tampered(lambda tree: tree["files"]["0.safetensors"].update(size=-1)),
        "greater than or equal to 0",
    ),
    "dims without end": (tampered(lambda tree: tree["tensors"]["weight/a"].update(shape=[9] * 10**5)), "at most 64"),
    "another tensor's bytes": (tampered(lambda tree: piece(tree).update(key="b")), "has no such piece of 'weight/a'"),
    "key that is not there": (tampered(lambda tree: piece(tree).update(key="c")), "has no such piece of 'weight/a'"),
    "unknown field": (tampered(lambda tree: tree.update(run="os.system")), "'run': Extra inputs"),
    "nested without end": (deep, "nested too deeply"),
    "number without end": (lambda tree: '{"step": ' + "9" * 10**6 + "}", "is damaged"),
    "no object": (lambda tree: "[]", "is damaged"),
}


@pytest.mark.parametrize(("text", "told"), MANIFESTS.values(), ids=MANIFESTS)
def test_manifest_that_lies_is_refused(text: Callable[[dict], str], told: str, folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(text(json.loads(path.read_text())))
    refused(lambda: read(folder), told)


def test_overlong_manifest_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST).open("r+") as file:
        file.truncate(MANIFEST_BYTES + 1)
    refused(lambda: read(folder), f"more than {MANIFEST_BYTES} bytes")


def test_many_boxes_take_no_longer_than_few() -> None:
    """Long slabs that lie across each other: comparing each with each would take hours."""
    count = 20_000
    shape = (2 * count, 2 * count)
    rows = [Box((n, 0), (n + 1, count)) for n in range(count)]
    columns = [Box((count, n), (2 * count, n + 1)) for n in range(count)]
    rest = [Box((0, count), (count, 2 * count)), Box((count, count), shape)]
    start = time.monotonic()
    assert tiles([*rows, *columns, *rest], shape)
    assert not tiles([*rows[:-1], rows[0], *columns, *rest], shape)
    assert time.monotonic() - start < TIME_S


def header(entries: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(*offsets: int, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS: dict[str, tuple[bytes, str]] = {
    "gigabytes long": (header({}, length=2**62), "it is no safetensors file"),
    "longer than the file": (header({}, length=100), "it is no safetensors file"),
    "empty": (b"", "it is no safetensors file"),
    "tensor beyond the file": (header({"a": entry(0, 2**40, shape=(2**38,))}), "its tensors have 1099511627776 bytes"),
    "offsets of another size": (header({"a": entry(0, 16, shape=(3,))}), "'a' does not lie where"),
    "tensors that share bytes": (header({"a": entry(0, 16), "b": entry(0, 16)}), "'b' does not lie where"),
    "hole": (header({"a": entry(8, 16, shape=(2,))}), "'a' does not lie where"),
    "bytes that are nobody's": (header({"a": entry(0, 8, shape=(2,))}), "have 8 bytes, 16 are there"),
    "negative offsets": (header({"a": entry(-16, 0)}), "greater than or equal to 0"),
    "negative shape": (header({"a": entry(0, 16, shape=(-2, -2))}), "greater than or equal to 0"),
    "backward": (header({"a": entry(16, 0)}), "'a' does not lie where"),
    "format": (header({"a": entry(0, 16, dtype="PICKLE")}), "unknown format 'PICKLE'"),
    "no object": (header([1]), "no JSON object"),
    "no JSON": (header(b"{" * 10), "is damaged"),
    "no text": (header(b"\xff" * 10), "is damaged"),
    "nested without end": (header(b"[" * 10**5), "nested too deeply"),
    "numbers without end": (header({"a": entry(0, 16, shape=[2**62] * 10**5)}), "at most 64"),
    "name of many lines": (header({"a\n" * 10**5: entry(8, 16, shape=(2,))}), "does not lie where"),
}


@pytest.mark.parametrize(("content", "told"), HEADERS.values(), ids=HEADERS)
def test_safetensors_header_that_lies_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refused(lambda: read(path), told)
    refused(lambda: convert_from(path, tmp_path / "out", rename=[]), told)
    assert list(tmp_path.iterdir()) == [path]


def test_header_as_safetensors_writes_it_is_believed(tmp_path: Path) -> None:
    tensors = {
        **WEIGHTS,
        "c": torch.ones(3, dtype=torch.bool),
        "d": torch.empty(0, 2),
        "e": torch.ones((), dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "w.safetensors")
    assert {name: (entry.shape, entry.torch_dtype) for name, entry in entries.items()} == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("file", ["../w.safetensors", "/etc/passwd", "nowhere.safetensors", ""])
def test_index_that_names_a_file_elsewhere_is_refused(file: str, tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    refused(lambda: read(tmp_path / "inside"), "is no plain file name|cannot be read")


def test_run_folder_calls_nothing_but_models_and_optimizers(tmp_path: Path) -> None:
    """A model is built by names that stand in a file of the run folder."""
    mark = tmp_path / "ran"
    for target in ("os.mkdir", "models.language.os.mkdir", "models.task.torch.hub.load", "torch.load", "builtins.exec"):
        section = {"net": [{"_target_": target, "_args_": [str(mark)]}]}
        refused(lambda: check_targets(section, tmp_path), "calls '.*', which is neither")  # noqa: B023  # called at once
    check_targets({"_target_": "models.language.LanguageModel", "o": {"_target_": "torch.optim.AdamW"}}, tmp_path)
    assert not mark.exists()


CALL = "oc.create:{_target_: os.mkdir, _args_: [MARK]}"
LATER: dict[str, tuple[str, str]] = {
    "schedule": (f"scheduler: '${{{CALL}}}'", "'model.scheduler' open, as '[$]"),
    "within text": ("net: {name: 'a ${oc.env:HOME}'}", "'model.net.name' open, as 'a [$]"),
    "in a list": (f"net: [1, '${{{CALL}}}']", "'model.net.1' open, as '[$]"),
    "target": ("net: {_target_: '${oc.decode:os.mkdir}'}", "'model.net._target_' open, as '[$]"),
    "in pairs": ("net: !!pairs [a: {_target_: os.mkdir, _args_: [MARK]}]", "calls 'os.mkdir', which is neither"),
}


@pytest.mark.parametrize(("line", "told"), LATER.values(), ids=LATER)
def test_run_folder_calls_nothing_that_only_hydra_would_read_as_a_call(line: str, told: str, tmp_path: Path) -> None:
    """OmegaConf interpolates when a model is built: what was a plain string is a section with a `_target_` then."""
    mark = tmp_path / "ran"
    text = f"_target_: models.language.LanguageModel\n{line}".replace("MARK", str(mark))
    refused(lambda: check_targets(yaml.safe_load(text), tmp_path), told)
    assert not mark.exists()


def test_call_of_an_interpolated_string_would_have_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = "_target_: builtins.dict\nscheduler: '${" + CALL.replace("MARK", str(mark)) + "}'"
    instantiate(yaml.safe_load(text), _convert_="all")
    assert mark.exists()


def test_nothing_is_left_of_what_was_refused(folder: Path, tmp_path: Path) -> None:
    content = bytearray((folder / "0.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "0.safetensors").write_bytes(content)

    def convert() -> None:
        convert_to("safetensors", folder, tmp_path / "w.safetensors", shard_gib=None, rename=[], trust=False)

    refused(convert, "0.safetensors is damaged: it holds other bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    with pytest.raises(ConfigError, match="exists already"):
        convert_to("safetensors", folder, folder, shard_gib=1, rename=[], trust=False)
    assert Manifest.read(folder).tensors.keys() == weights_of(folder).manifest.tensors.keys()
