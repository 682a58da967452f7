"""Images: digits, IDX folders, and one clear line for every file that is of no use."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.images import ImageData, read_idx

NUM_TRAIN, NUM_VAL, SIZE = 30, 12, 5


def image_data(folder: Path | None, **settings: Any) -> ImageData:
    defaults: dict[str, Any] = {
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "seed": 0,
        "folder": None if folder is None else str(folder),
        "image_size": SIZE,
        "num_classes": 3,
    }
    return ImageData(**(defaults | settings))


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """MNIST in small: all four files, with random pixels and labels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("t10k", NUM_VAL)):
        images = rng.integers(0, 256, (count, SIZE, SIZE))
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 3))
    return tmp_path


def test_digits_are_split_once_and_for_all() -> None:
    data = image_data(None, image_size=8, num_classes=10)
    data.prepare()
    train, val = data.train_samples(), data.val_samples()
    assert (len(train), len(val)) == (1498, 299)
    images, labels = val.batch(np.arange(299))
    assert images.shape == (299, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    assert np.bincount(labels).min() >= 20
    reseeded = image_data(None, image_size=8, num_classes=10, seed=7).val_samples()
    assert np.array_equal(images, reseeded.batch(np.arange(299))[0])
    assert data.tokens_per_sample == 1


def test_training_images_are_standardised_and_validation_images_by_the_same_constants(folder: Path) -> None:
    data = image_data(folder)
    data.prepare()
    (train, _), (val, _) = data.train_samples().batch(np.arange(30)), data.val_samples().batch(np.arange(12))
    assert train.mean() == pytest.approx(0, abs=1e-6)
    assert train.std() == pytest.approx(1, abs=1e-6)
    raw_train = read_idx(folder / "train-images-idx3-ubyte", num_dims=3) / 255
    raw_val = read_idx(folder / "t10k-images-idx3-ubyte", num_dims=3) / 255
    assert val[:, 0] == pytest.approx((raw_val - raw_train.mean()) / raw_train.std(), abs=1e-5)


def test_images_and_labels_stay_together(folder: Path) -> None:
    samples = image_data(folder).train_samples()
    images, labels = samples.batch(np.array([4, 0, 8]))
    assert labels.tolist() == [1, 0, 2]
    assert images.flags.writeable
    assert np.array_equal(images[1], samples.batch(np.array([0]))[0][0])


def test_compressed_files_are_read_alike(folder: Path) -> None:
    plain = image_data(folder).train_samples().batch(np.arange(30))
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    compressed = image_data(folder).train_samples().batch(np.arange(30))
    assert np.array_equal(plain[0], compressed[0])
    assert np.array_equal(plain[1], compressed[1])


def test_images_of_one_shade_do_not_divide_by_zero(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.full((NUM_TRAIN, SIZE, SIZE), 7)))
    assert not image_data(folder).train_samples().batch(np.arange(3))[0].any()


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewritten(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return rewritten


def leave_nothing(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, SIZE, SIZE))))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))


def compress_and_cut(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
        r"^data\.folder='.*' has no t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz; give",
    ),
    "magic": (
        rewrite("train-images-idx3-ubyte", lambda raw: b"\x89PNG" + raw[4:]),
        r"train-images-idx3-ubyte starts with 89504e47, not with IDX's 00000803; fetch it again\.$",
    ),
    "swapped": (
        rewrite("train-labels-idx1-ubyte", lambda raw: idx(np.zeros((2, 2, 2)))),
        r"train-labels-idx1-ubyte starts with 00000803, not with IDX's 00000801",
    ),
    "no_header": (rewrite("t10k-labels-idx1-ubyte", lambda raw: raw[:6]), "has 6 bytes where its header asks for"),
    "truncated": (
        rewrite("t10k-images-idx3-ubyte", lambda raw: raw[:-1]),
        "t10k-images-idx3-ubyte has 315 bytes where its header asks for 316; fetch it again",
    ),
    "cut_gzip": (compress_and_cut, r"train-images-idx3-ubyte\.gz cannot be read \(.*\); fetch it again\.$"),
    "counts": (
        rewrite("train-labels-idx1-ubyte", lambda raw: idx(np.zeros(29))),
        r"has 30 images and train-labels-idx1-ubyte 29 labels",
    ),
    "empty": (leave_nothing, "has 0 images and t10k-labels-idx1-ubyte 0 labels"),
    "not_square": (
        rewrite("train-images-idx3-ubyte", lambda raw: idx(np.zeros((NUM_TRAIN, 5, 6)))),
        r"^data\.image_size=5 does not fit .*, whose images are 5x6; give square images\.$",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_is_of_no_use_is_named_in_one_line(folder: Path, case: str) -> None:
    damage, complaint = UNUSABLE[case]
    damage(folder)
    with pytest.raises(ValueError, match=r"^data\.\w+") as raised:
        image_data(folder).prepare()
    assert re.search(complaint, str(raised.value))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bundled", [True, False])
def test_settings_that_do_not_fit_the_images_name_those_that_do(folder: Path, bundled: bool) -> None:
    size, classes = (8, 10) if bundled else (SIZE, 3)
    source = None if bundled else folder
    with pytest.raises(ValueError, match=rf"^data\.image_size=28 does not fit .*; set data\.image_size={size}\.$"):
        image_data(source, image_size=28, num_classes=classes).prepare()
    with pytest.raises(ValueError, match=rf"^data\.num_classes=2 is too few .*; set data\.num_classes={classes}\.$"):
        image_data(source, image_size=size, num_classes=2).prepare()
    with pytest.raises(ValueError, match="num_channels"):
        image_data(source, num_channels=3)
