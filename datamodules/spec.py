"""What every data choice promises: pure settings, checked and prepared before a process is started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from datamodules.order import Indices
from datamodules.reading import file_digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
    from numpy.typing import NDArray

FORBID_EXTRA = ConfigDict(extra="forbid")


class Samples(Protocol):
    """A finite set of samples that is read by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> tuple[NDArray[Any], ...]:
        """The samples at `indices` [batch] as new, writable arrays, each with `batch` as its first dimension."""


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class Data(ABC):
    """Settings of what a run is trained on.

    `global_batch_size` is in samples per optimizer step, over all data ranks; `micro_batch_size` in samples per
    forward of one data rank.
    """

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt

    @property
    @abstractmethod
    def tokens_per_sample(self) -> int:
        """What one sample counts for in tokens/s: the length of its sequence, or 1 where there is none."""

    @abstractmethod
    def prepare(self) -> None:
        """Check the data and cache what is costly, so that ranks only open it.

        Imports no torch. Any number of processes may call it at once, and again: it is cheap when all is cached.

        Raises:
            ValueError: the data or the settings are of no use; one line with key, value and fix.
        """

    @abstractmethod
    def build(self) -> LightningDataModule:
        """The Lightning side of these settings; this is what imports torch."""


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class SampledData(Data):
    """Data whose samples are read by index, so that Concord's own order decides which one comes when."""

    # Lightning's seed_everything takes no more than 32 bits.
    seed: int = Field(ge=0, lt=2**32)
    num_workers: NonNegativeInt = 0
    max_val_samples: PositiveInt | None = None
    val_batch_size: PositiveInt | None = None  # of a rank, in validation; None is micro_batch_size

    @abstractmethod
    def train_samples(self) -> Samples:
        """The training split."""

    @abstractmethod
    def val_samples(self) -> Samples:
        """The whole validation split; `max_val_samples` thins it out later."""

    def source_files(self) -> list[Path]:
        """The files that it is read from, in their order; none where the settings alone say what it is."""
        return []

    def digest(self) -> str | None:
        """A digest of the content of `source_files`; None where there is none. ValueError if one cannot be read."""
        digests = [file_digest(path) for path in self.source_files()]
        return sha256("".join(digests).encode()).hexdigest() if digests else None

    def build(self) -> LightningDataModule:
        from datamodules.loading import SampleDataModule

        return SampleDataModule(self)
