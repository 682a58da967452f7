"""What a strategy says about itself before any process exists: pure data and arithmetic, no torch at import."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from models.plan import ParallelPlan

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as Engine

STRICT = ConfigDict(extra="forbid")
AxisSize = PositiveInt | Literal["auto"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]

# A rehearsal on CPU that was not told otherwise: the fewest processes that still have somebody to talk to.
REHEARSAL_PROCESSES = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mesh:
    """Sizes of the three axes over which ranks are laid out; `auto` is what is left of the world (one axis at most)."""

    pipe: AxisSize = 1
    data: AxisSize = 1
    tensor: AxisSize = 1

    @property
    def sizes(self) -> dict[str, int | str]:
        return {"pipe": self.pipe, "data": self.data, "tensor": self.tensor}

    @property
    def fixed(self) -> int:
        """Product of the sizes that are stated."""
        return math.prod(size for size in self.sizes.values() if isinstance(size, int))

    @property
    def open_axes(self) -> list[str]:
        return [axis for axis, size in self.sizes.items() if size == "auto"]

    def resolve(self, devices: int | None) -> Mesh:
        """This mesh with every size a number, on `devices` devices (None: as many processes as a rehearsal needs).

        A mesh that states all its sizes takes its product and leaves further devices idle: `single` on two GPUs
        is one process.
        """
        if len(self.open_axes) > 1:
            raise ValueError(f"strategy.mesh: only one axis can be auto, got {' and '.join(self.open_axes)}.")
        if not self.open_axes:
            if devices is not None and devices < self.fixed:
                raise ValueError(
                    f"strategy.mesh={self.text} takes {self.fixed} devices, but launcher.devices={devices}; "
                    f"set launcher.devices={self.fixed} or shrink an axis of strategy.mesh."
                )
            return self
        if devices is None:
            devices = max(self.fixed, REHEARSAL_PROCESSES)
        if devices % self.fixed:
            raise ValueError(
                f"launcher.devices={devices} does not divide into strategy.mesh={self.text}; "
                f"choose a multiple of {self.fixed}, such as {self.fixed * math.ceil(devices / self.fixed)}."
            )
        axis = self.open_axes[0]
        return Mesh(**{**self.sizes, axis: devices // self.fixed})  # type: ignore[arg-type]  # sizes are AxisSize

    @property
    def world_size(self) -> int:
        """Number of ranks of a resolved mesh."""
        assert not self.open_axes
        return self.fixed

    @property
    def data_ranks(self) -> int:
        """Number of ranks that see different samples, of a resolved mesh."""
        assert isinstance(self.data, int)
        return self.data

    @property
    def text(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Precision:
    """Number formats of a run: stored parameters, products, gradient reduction, and the optimizer's master weights."""

    name: str
    parameter: Dtype
    compute: Dtype
    reduce: Dtype
    master: Dtype

    @property
    def lightning(self) -> str:
        """The same choice in Lightning's words: "true" stores in the compute format, "mixed" autocasts to it."""
        short = {"float64": "64", "float32": "32", "bfloat16": "bf16", "float16": "16"}[self.compute]
        return f"{short}-{'true' if self.parameter == self.compute else 'mixed'}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Strategy(ABC):
    """How one model is spread over processes: its mesh, its conditions, and the Lightning strategy that does it."""

    name: str
    mesh: Mesh = Field(default_factory=Mesh)

    needs: ClassVar[frozenset[str]] = frozenset()  # parts of ParallelPlan without which this strategy cannot run

    @abstractmethod
    def check(self, plan: ParallelPlan | None, world_size: int) -> None:
        """Raise ValueError (key, value, fix) if this strategy cannot run so; `plan` is None when `needs` is empty."""

    @abstractmethod
    def build(self, *, precision: Precision, seed: int, accelerator: str, timeout_s: float) -> Engine:
        """The Lightning strategy that trains so; imports torch, so only workers call it."""
