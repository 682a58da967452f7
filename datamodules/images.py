"""Small grey images with a class each: scikit-learn's digits, or a folder in the IDX format of MNIST."""

import gzip
import zlib
from math import prod, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from datamodules.order import Indices
from datamodules.refused import RefusedError
from datamodules.spec import FORBID_EXTRA, SampledData

Pixels = NDArray[np.uint8]

_DIGITS_SIZE, _DIGITS_CLASSES = 8, 10
# One digit of six, 299 of 1,797: about the share of MNIST's test set (10,000 of 70,000).
_DIGITS_VAL_EVERY = 6
_IDX_UNSIGNED_BYTE = 0x08


class ImageSamples:
    """Images [samples, height, width] and labels [samples]; `grey_values` [256] is what each pixel value becomes."""

    def __init__(self, images: Pixels, labels: NDArray[np.int64], grey_values: NDArray[np.float32]) -> None:
        self._images, self._labels, self._grey_values = images, labels, grey_values

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Indices) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Images [batch, 1, height, width] and labels [batch]."""
        return self._grey_values[self._images[indices]][:, None], self._labels[indices]


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class ImageData(SampledData):
    """Settings of images: `folder` holds MNIST's four files, plain or .gz; None means scikit-learn's digits."""

    folder: str | None = None
    image_size: PositiveInt
    num_channels: Literal[1] = 1
    num_classes: PositiveInt

    @property
    def tokens_per_sample(self) -> int:
        return 1

    def prepare(self) -> None:
        if self.folder is None:
            # Two constants: importing scikit-learn to check them would cost a second before launch.
            self._check_size("scikit-learn's digits", (_DIGITS_SIZE, _DIGITS_SIZE))
            self._check_classes("scikit-learn's digits", _DIGITS_CLASSES)
        else:
            self._read_idx("train")
            self._read_idx("t10k")

    def source_files(self) -> list[Path]:
        if self.folder is None:
            return []
        folder = Path(self.folder).expanduser()
        return [_find(folder, name) for split in ("train", "t10k") for name in _names(split)]

    def train_samples(self) -> ImageSamples:
        images, labels = self._read("train")
        return ImageSamples(images, labels, _standardised(images))

    def val_samples(self) -> ImageSamples:
        train_images, _ = self._read("train")
        images, labels = self._read("t10k")
        return ImageSamples(images, labels, _standardised(train_images))

    def _read(self, split: str) -> tuple[Pixels, NDArray[np.int64]]:
        """Images and labels of `train` or `t10k`, as MNIST calls the two."""
        if self.folder is not None:
            return self._read_idx(split)
        images, labels = _read_digits()
        held_out = np.arange(len(images)) % _DIGITS_VAL_EVERY == _DIGITS_VAL_EVERY - 1
        chosen = held_out if split == "t10k" else ~held_out
        return images[chosen], labels[chosen]

    def _read_idx(self, split: str) -> tuple[Pixels, NDArray[np.int64]]:
        folder = Path(self.folder or "").expanduser()
        images_path, labels_path = (_find(folder, name) for name in _names(split))
        images, labels = read_idx(images_path, num_dims=3), read_idx(labels_path, num_dims=1)
        if len(images) != len(labels) or len(images) == 0:
            raise RefusedError(
                f"data.folder: {images_path} has {len(images)} images and {labels_path.name} {len(labels)} labels; "
                "give files that belong together."
            )
        self._check_size(str(images_path), images.shape[1:])
        self._check_classes(str(labels_path), int(labels.max()) + 1)
        return images, labels.astype(np.int64)

    def _check_size(self, what: str, size: tuple[int, ...]) -> None:
        height, width = size
        if (height, width) != (self.image_size, self.image_size):
            raise RefusedError(
                f"data.image_size={self.image_size} does not fit {what}, whose images are {height}x{width}; "
                + (f"set data.image_size={height}." if height == width else "give square images.")
            )

    def _check_classes(self, what: str, num_classes: int) -> None:
        if num_classes > self.num_classes:
            raise RefusedError(
                f"data.num_classes={self.num_classes} is too few for {what}; set data.num_classes={num_classes}."
            )


def read_idx(path: Path, *, num_dims: int) -> Pixels:
    """Read an IDX file of unsigned bytes, plain or .gz.

    Its header is two zero bytes, the type, the number of dimensions and each of them in four big-endian bytes:
    LeCun, Cortes and Burges, "The MNIST database of handwritten digits", http://yann.lecun.com/exdb/mnist.

    Raises:
        ValueError: the file is unreadable, of another format or type, or of another length than it says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RefusedError(f"data.folder: {path} cannot be read ({error}); fetch it again.") from None
    magic, header_bytes = bytes([0, 0, _IDX_UNSIGNED_BYTE, num_dims]), 4 + 4 * num_dims
    if raw[:4] != magic:
        raise RefusedError(
            f"data.folder: {path} starts with {raw[:4].hex()}, not with IDX's {magic.hex()}; fetch it again."
        )
    shape = [int.from_bytes(raw[start : start + 4], "big") for start in range(4, header_bytes, 4)]
    if len(raw) != header_bytes + prod(shape):
        raise RefusedError(
            f"data.folder: {path} has {len(raw)} bytes where its header asks for {header_bytes + prod(shape)}; "
            "fetch it again."
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _names(split: str) -> tuple[str, str]:
    """What MNIST calls the images and the labels of `train` or `t10k`."""
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise RefusedError(
        f"data.folder={str(folder)!r} has no {name} nor {name}.gz; give a folder with MNIST's four files."
    )


def _read_digits() -> tuple[Pixels, NDArray[np.int64]]:
    # Half a second to import: only the processes that train on the digits pay for it.
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


def _standardised(train_images: Pixels) -> NDArray[np.float32]:
    """Each pixel value [256], shifted and scaled to mean 0 and deviation 1 over all training pixels.

    From whole-number sums, so the same on every machine; what counts as white cancels out.
    """
    counts = np.bincount(train_images.ravel(), minlength=256).tolist()
    total, first, second = (sum(count * value**power for value, count in enumerate(counts)) for power in range(3))
    deviation = sqrt(total * second - first**2) / total
    # Images of one shade have no deviation to divide by.
    return ((np.arange(256) - first / total) / (deviation or 1.0)).astype(np.float32)
