"""The strategies that keep the whole model on every rank: one process, and data parallelism by all-reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from models.plan import ParallelPlan
from strategies.spec import STRICT, Precision, Strategy

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as Engine


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Single(Strategy):
    """One process, one device: what every other strategy is compared with."""

    def check(self, plan: ParallelPlan | None, world_size: int) -> None:
        if world_size != 1:
            raise ValueError(
                f"strategy={self.name} is one process, got {self.mesh.text}; for more choose strategy=ddp."
            )

    def build(self, *, precision: Precision, seed: int, accelerator: str, timeout_s: float) -> Engine:
        from strategies.engines.replicate import SingleEngine

        return SingleEngine(precision=precision, seed=seed, accelerator=accelerator)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DDP(Strategy):
    """The model on every rank, gradients averaged by all-reduce in buckets while backward still runs."""

    bucket_mb: PositiveInt = 25  # torch's default; smaller buckets overlap sooner, larger ones cost fewer calls

    def check(self, plan: ParallelPlan | None, world_size: int) -> None:
        for axis in ("pipe", "tensor"):
            if self.mesh.sizes[axis] != 1:
                raise ValueError(
                    f"strategy.mesh.{axis}={self.mesh.sizes[axis]}: strategy={self.name} spreads over the data axis "
                    f"only; set it to 1."
                )

    def build(self, *, precision: Precision, seed: int, accelerator: str, timeout_s: float) -> Engine:
        from strategies.engines.replicate import DDPEngine

        return DDPEngine(
            precision=precision, seed=seed, accelerator=accelerator, timeout_s=timeout_s, bucket_mb=self.bucket_mb
        )
