"""What a strategy says about itself before any process exists: pure data and arithmetic, no torch at import."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from models.plan import Chain, ParallelPlan

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import Strategy as Engine

    from models.stats import ModelStats

STRICT = ConfigDict(extra="forbid")
AxisSize = PositiveInt | Literal["auto"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Checkpointing = Literal["none", "full"] | Annotated[str, Field(pattern=r"^every_[1-9][0-9]*$")]
BYTES: dict[Dtype, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# A rehearsal on CPU that was not told otherwise: the smallest axis on which a rank still has somebody to talk to.
REHEARSAL_RANKS = 2


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

    def resolve(self, devices: int | None, rehearsal_ranks: int = REHEARSAL_RANKS) -> Mesh:
        """This mesh with every size a number, on `devices` devices (None: `rehearsal_ranks` on the open axis).

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
            devices = self.fixed * rehearsal_ranks
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
    def cuts(self) -> bool:
        """Whether a model is taken apart: by its blocks or by its matrices."""
        return self.pipe != 1 or self.tensor != 1

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
    def autocasts(self) -> bool:
        """Whether products are taken in another format than the parameters are stored in."""
        return self.parameter != self.compute

    @property
    def copies_master(self) -> bool:
        """Whether the optimizer works on a copy of the weights in a wider format."""
        return self.parameter != self.master

    @property
    def lightning(self) -> str:
        """The same choice in Lightning's words: "true" stores in the compute format, "mixed" autocasts to it."""
        short = {"float64": "64", "float32": "32", "bfloat16": "bf16", "float16": "16"}[self.compute]
        return f"{short}-{'mixed' if self.autocasts else 'true'}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What memory and traffic depend on besides the strategy and the model."""

    precision: Precision
    accumulation: int = 1  # micro-batches of a data rank per optimizer step
    micro_batch_size: int = 1  # samples in each of them
    on_gpu: bool = False
    moments: int = 2  # tensors that the optimizer keeps per parameter besides the weight itself: AdamW 2, momentum 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one rank holds for the state of the model, by category; activations are not among them.

    Where ranks differ, the rank that holds most. What an allocator adds, and what an operator needs for an instant, is
    not counted. Padding, where a strategy pads, is part of the category that it pads.
    """

    parameters: int  # the copy that forward and backward compute with, between steps
    gradients: int  # at their peak within a step, outside of communication buffers
    optimizer: int  # master weights (where they are a copy) and moments
    buffers: int  # communication buffers: gradient buckets, parameters gathered for a moment
    host: int = 0  # of the above, bytes that lie in the host's memory instead of the device's
    disk: int = 0  # of the above, bytes that lie on disk

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


Collective = Literal["all_reduce", "reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send", "recv"]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What one rank hands to one kind of collective over one mesh axis in an optimizer step.

    payload: bytes of the whole message: the tensor that is reduced, all parts of what is gathered or scattered.
    """

    collective: Collective
    axis: Literal["pipe", "data", "tensor"]
    ranks: int  # size of the group
    payload: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that a rank sends under the ring algorithms (Patarasuk and Yuan 2009, sections 3 and 4)."""
        share = (self.ranks - 1) / self.ranks
        match self.collective:
            case "all_reduce":
                return 2 * share * self.payload
            case "all_gather" | "reduce_scatter" | "all_to_all":
                return share * self.payload
            case "recv":
                return 0.0
        return float(self.payload) if self.ranks > 1 else 0.0


Traffic = tuple[Transfer, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a strategy must know of the run that it serves; `accelerator` is cpu or gpu."""

    precision: Precision
    seed: int
    accelerator: str
    timeout_s: float  # for a collective, while the run starts
    micro_batch_size: int  # samples of a data rank per training step
    compile: bool = False  # whether the plan's blocks are compiled
    sync_batchnorm: bool = False  # whether BatchNorm's statistics are those of all data ranks' samples
    stats: ModelStats | None = None  # None before the model is made, and where it cannot be measured

    @property
    def on_gpu(self) -> bool:
        return self.accelerator == "gpu"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Strategy(ABC):
    """How one model is spread over processes: its mesh, its conditions, and the Lightning strategy that does it."""

    name: str
    mesh: Mesh = Field(default_factory=Mesh)
    activation_checkpointing: Checkpointing = "none"  # blocks whose activations are computed again in backward

    @final  # a strategy's own needs are `cuts_at`
    @property
    def needs(self) -> frozenset[str]:
        """Parts of ParallelPlan without which this strategy cannot run."""
        return self.cuts_at | ({"blocks"} if self.activation_checkpointing != "none" else frozenset())

    @property
    def cuts_at(self) -> frozenset[str]:
        """Parts of ParallelPlan by which this kind of strategy spreads a model."""
        return frozenset()

    @property
    def rehearsal_ranks(self) -> int:
        """Size of the open mesh axis where nobody has said how many devices there are."""
        return REHEARSAL_RANKS

    @property
    def extensions(self) -> tuple[str, ...]:
        """Names of DeepSpeed's C++ extensions that must be built before a run can start."""
        return ()

    @property
    def keeps_whole(self) -> bool:
        """Whether each rank has all of the module's parameters between steps."""
        return False

    @property
    def unsaved(self) -> str | None:
        """What of it no checkpoint can hold, in words; None where there is nothing."""
        return None

    @abstractmethod
    def check(self, run: Run) -> None:
        """Raise ValueError (key, value, fix) if this strategy, with its mesh resolved, cannot serve `run`."""

    def check_plan(self, plan: ParallelPlan, chain: Chain) -> None:  # noqa: B027  # most strategies take any plan
        """Raise ValueError if a model whose plan has what `needs` asks for cannot be spread so all the same."""

    def check_module(self, module: LightningModule, run: Run) -> None:  # noqa: B027  # most strategies take any module
        """Raise ValueError if what `module` does, or its net, cannot go with this strategy; imports torch.

        The net may lie on the meta device.
        """

    @abstractmethod
    def memory(self, stats: ModelStats, workload: Workload) -> Memory:
        """Bytes per rank, of a strategy whose mesh is resolved."""

    @abstractmethod
    def traffic(self, stats: ModelStats, workload: Workload) -> Traffic:
        """What a rank communicates in one optimizer step, in steady state; norms and flags of a few bytes are left out.

        Validation and logging are not in it. The mesh is resolved.
        """

    @abstractmethod
    def build(self, run: Run) -> Engine:
        """The Lightning strategy that trains so; imports torch, so only workers call it."""


def only_data_axis(strategy: Strategy) -> None:
    """ValueError unless the mesh spreads over the data axis alone."""
    for axis in ("pipe", "tensor"):
        if strategy.mesh.sizes[axis] != 1:
            raise ValueError(
                f"strategy.mesh.{axis}={strategy.mesh.sizes[axis]}: strategy={strategy.name} spreads over the data "
                f"axis only; set it to 1."
            )
