"""Checkpoints on disk: whole or not there, and read back by whatever boxes a rank wants."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    LossScale,
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


def test_step_that_is_yet_to_be_saved_takes_nobody_s_place_among_the_best(tmp_path: Path) -> None:
    best = write(tmp_path, 4, halves())
    newest = write(tmp_path, 10, halves())
    for step, loss in {4: 2.0, 12: 1.0}.items():  # the save of step 12 waits for that of step 10
        note_val_loss(tmp_path, step, loss)
    sweep(tmp_path, keep_last=1, keep_best=1)
    assert checkpoints(tmp_path) == [best, newest]


def stepped(make: Callable[..., torch.optim.Optimizer], steps: int) -> tuple[list[Held], torch.optim.Optimizer]:
    """Two matrices, of which the second is frozen."""
    weights = [nn.Parameter(torch.ones(5, 7)), nn.Parameter(torch.ones(5, 7), requires_grad=False)]
    optimizer = make(weights, lr=0.1)
    for _ in range(steps):
        weights[0].grad = torch.ones_like(weights[0])
        optimizer.step()
    return [Held.whole(f"w{number}", weight, writes=True) for number, weight in enumerate(weights)], optimizer


def written(held: list[Held], optimizer: torch.optim.Optimizer, folder: Path, scale: LossScale | None = None) -> Reader:
    path = write(folder, 3, [[named for one in held for named in tensors_of(one, optimizer)]])
    return Reader(path, Manifest.read(path).model_copy(update={"loss_scale": scale}))


SGD, AdamW, Momentum = torch.optim.SGD, torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (AdamW, SGD, "kept exp_avg, exp_avg_sq, step, and SGD keeps nothing"),
        (SGD, AdamW, "kept nothing, and AdamW keeps exp_avg, exp_avg_sq, step"),
        (SGD, Momentum, "kept nothing, and SGD keeps momentum_buffer"),
        (Momentum, AdamW, "kept momentum_buffer, and AdamW keeps"),
    ],
)
def test_another_optimizer_is_told_also_where_one_keeps_nothing(
    before: Callable, after: Callable, told: str, tmp_path: Path
) -> None:
    held, optimizer = stepped(after, 0)
    with written(*stepped(before, 3), tmp_path) as reader, pytest.raises(ValueError, match=told):
        load(reader, held, optimizer)


@pytest.mark.parametrize("make", [SGD, Momentum, AdamW])
def test_same_optimizer_is_not_told_of_what_is_frozen_or_kept_by_nobody(make: Callable, tmp_path: Path) -> None:
    with written(*stepped(make, 3), tmp_path) as reader:
        held, optimizer = stepped(make, 0)
        load(reader, held, optimizer)
        load(reader, held[1:], make([nn.Parameter(torch.ones(5, 7))], lr=0.1))  # a rank that steps none of it
    assert bool(optimizer.state) == (make is not SGD)
    assert held[1].stepped not in optimizer.state


def test_run_whose_steps_all_overflowed_goes_on_with_no_state(tmp_path: Path) -> None:
    held, optimizer = stepped(AdamW, 0)
    with written(*stepped(AdamW, 0), tmp_path / "a", LossScale(value=2.0, good_steps=0)) as reader:
        load(reader, held, optimizer)
    assert not optimizer.state
    with (
        written(*stepped(SGD, 3), tmp_path / "b", LossScale(value=2.0, good_steps=3)) as reader,
        pytest.raises(ValueError, match="kept nothing, and AdamW"),
    ):
        load(reader, held, optimizer)
