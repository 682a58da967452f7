"""Checkpoints on disk: whole or not there, and read back by whatever boxes a rank wants."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.resume import find
from strategies.boxes import Box, boxes_of_range
from strategies.checkpoint import (
    MANIFEST,
    REPLACED,
    Manifest,
    begin,
    checkpoints,
    clear,
    digest,
    folder_of,
    note_val_loss,
    recover,
    sweep,
)
from strategies.engines.checkpoint import CODES, Held, Named, Reader, Writer, load, tensors_of, write_file
from strategies.weights import find_weights

WEIGHT = torch.arange(35.0).view(5, 7)


def write(run_dir: Path, step: int, named: list[list[Named]]) -> Path:
    """A checkpoint of what each of some ranks holds, which are threads here."""
    folder = folder_of(run_dir, step)

    def manifest(files: dict, tensors: dict) -> Manifest:
        return Manifest(
            step=step,
            strategy="any",
            mesh={"data": len(named)},
            trained={},
            schedulers=[],
            files=files,
            tensors=tensors,
        )

    def write_rank(rank: int) -> None:
        Writer(rank=rank, world_size=len(named), asynchronous=False, after=lambda: None).save(
            folder, named[rank], manifest
        )

    with ThreadPoolExecutor(len(named)) as pool:
        for done in [pool.submit(write_rank, rank) for rank in range(len(named))]:
            done.result()
    return folder


def halves() -> list[list[Named]]:
    """A matrix on two ranks: by columns, as tensor ranks hold it."""
    boxes = [Box((0, 0), (5, 3)), Box((0, 3), (5, 7))]
    return [[("weight/w", (5, 7), box, WEIGHT[box.inside(Box.whole((5, 7)))])] for box in boxes]


def test_any_box_is_read_from_whatever_boxes_were_written(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, halves())
    manifest = Manifest.read(folder)
    manifest.check(folder)
    whole = Box.whole((5, 7))
    with Reader(folder, manifest) as reader:
        for first, end in ((0, 35), (4, 20), (17, 18), (30, 35)):
            for box in boxes_of_range(first, end, (5, 7)):
                assert torch.equal(reader.read("weight/w", box), WEIGHT[box.inside(whole)])


def test_optimizer_state_is_made_and_filled_without_a_step(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 7))
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight) * weight.detach()
            optimizer.step()
        return weight, optimizer

    weight, optimizer = trained(3)
    folder = write(tmp_path, 3, [list(tensors_of(Held.whole("w", weight, writes=True), optimizer))])
    fresh, other = trained(0)
    with Reader(folder, Manifest.read(folder)) as reader:
        load(reader, [Held.whole("w", fresh, writes=True)], other)
    assert torch.equal(fresh, weight)
    state: dict[str, Tensor] = other.state[fresh]
    assert state.keys() == optimizer.state[weight].keys()
    assert all(torch.equal(value, optimizer.state[weight][key]) for key, value in state.items())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["params"]) == (0.1, [fresh])


def test_model_that_the_checkpoint_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, halves())
    weight = nn.Parameter(torch.zeros(5, 7))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with Reader(folder, Manifest.read(folder)) as reader:
        with pytest.raises(ValueError, match="it has weight/v not at all"):
            load(reader, [Held.whole("v", weight, writes=True)], optimizer)
        with pytest.raises(ValueError, match=r"it has weight/w in shape \(5, 7\), not \(7, 5\)"):
            load(reader, [Held.whole("w", torch.zeros(7, 5), writes=True)], optimizer)


def test_checkpoint_of_which_a_rank_wrote_nothing_is_never_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of weight/w, 15 of 35 elements were written"):
        write(tmp_path, 3, halves()[:1])
    assert checkpoints(tmp_path) == []


def test_unfinished_checkpoint_is_not_found_and_swept(tmp_path: Path) -> None:
    first, second = write(tmp_path, 3, halves()), write(tmp_path, 12, halves())
    partial = begin(folder_of(tmp_path, 20))
    assert checkpoints(tmp_path) == [first, second]
    clear(tmp_path, 12)
    assert not partial.exists()
    sweep(tmp_path, keep_last=1)
    assert checkpoints(tmp_path) == [second]


def test_checkpoint_that_was_to_be_replaced_is_found_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 3, halves())
    folder = write(tmp_path, 12, halves())
    replaced = folder.rename(folder.with_name(folder.name + REPLACED))  # the run was killed before the next rename
    begin(folder)
    assert find(str(tmp_path)) == find(str(folder)) == find_weights(tmp_path) == replaced
    assert replaced.exists()
    recover(tmp_path)
    assert find(str(tmp_path)) == find(str(folder)) == find_weights(tmp_path) == folder
    folder.with_name(folder.name + REPLACED).mkdir()  # the run was killed before it was removed
    assert find(str(tmp_path)) == folder


def test_what_was_passed_over_is_called_damaged(tmp_path: Path) -> None:
    first, second = write(tmp_path, 3, halves()), write(tmp_path, 12, halves())
    clear(tmp_path, 3)
    assert checkpoints(tmp_path) == [first]
    assert (tmp_path / "checkpoints/step-00000012.damaged").exists()
    assert write(tmp_path, 12, halves()) == second


def test_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    folders = {step: write(tmp_path, step, halves()) for step in (1, 2, 3, 4, 5)}
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 9.0}.items():
        note_val_loss(tmp_path, step, loss)
    sweep(tmp_path, keep_last=1, keep_best=2)
    assert checkpoints(tmp_path) == [folders[2], folders[3], folders[5]]


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_file_is_what_safetensors_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = [torch.arange(12).view(3, 4).to(dtype).t(), torch.ones((), dtype=dtype), torch.empty(0, 2, dtype=dtype)]
    file = write_file(tmp_path / "file", tensors)
    assert (file.size, file.sha256) == ((tmp_path / "file").stat().st_size, digest(tmp_path / "file"))
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[str(number)], tensor) for number, tensor in enumerate(tensors))
    assert all(read[str(number)].dtype == dtype for number in range(3))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "word"),
    [
        (Path.unlink, "1.safetensors", "1.safetensors is missing"),
        (cut_short, "0.safetensors", "0.safetensors is damaged: it has"),
        (flip_bit, "1.safetensors", "1.safetensors is damaged: it holds other bytes"),
        (cut_short, MANIFEST, "is damaged"),
        (Path.unlink, MANIFEST, "is no checkpoint"),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_damage_is_told_in_one_line(damage: Callable[[Path], None], name: str, word: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 3, halves())
    damage(folder / name)
    with pytest.raises(ValueError, match=word) as refusal:
        Manifest.read(folder).check(folder)
    assert "\n" not in str(refusal.value)
