"""The strategies that keep the whole model on every rank: one process, and data parallelism by all-reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from strategies.spec import BYTES, STRICT, Memory, Run, Strategy, Traffic, Transfer, Workload, only_data_axis

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as Engine

    from models.stats import ModelStats


def whole_model(stats: ModelStats, workload: Workload) -> Memory:
    """What a rank holds that keeps all of the model: weights, gradients in the same format, master copy, moments."""
    precision = workload.precision
    parameter, master = BYTES[precision.parameter], BYTES[precision.master]
    copies = workload.moments + precision.copies_master
    return Memory(
        parameters=stats.parameters * parameter,
        # Where the optimizer works on a wider copy of the weights, the gradient is widened for its step.
        gradients=stats.parameters * (parameter + precision.copies_master * master),
        optimizer=stats.parameters * copies * master,
        buffers=0,
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Single(Strategy):
    """One process, one device: what every other strategy is compared with."""

    @property
    def keeps_whole(self) -> bool:
        return True

    def check(self, run: Run) -> None:
        if self.mesh.world_size != 1:
            raise ValueError(
                f"strategy={self.name} is one process, got {self.mesh.text}; for more choose strategy=ddp."
            )

    def memory(self, stats: ModelStats, workload: Workload) -> Memory:
        return whole_model(stats, workload)

    def traffic(self, stats: ModelStats, workload: Workload) -> Traffic:
        return ()

    def build(self, run: Run) -> Engine:
        from strategies.engines.replicate import SingleEngine

        return SingleEngine(run, checkpointing=self.activation_checkpointing)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DDP(Strategy):
    """The model on every rank, gradients averaged by all-reduce in buckets while backward still runs."""

    bucket_mb: PositiveInt = 25  # torch's default; smaller buckets overlap sooner, larger ones cost fewer calls
    find_unused_parameters: bool = False  # as torch's: each backward looks first for what the loss does not reach

    @property
    def keeps_whole(self) -> bool:
        return True

    def check(self, run: Run) -> None:
        only_data_axis(self)

    def memory(self, stats: ModelStats, workload: Workload) -> Memory:
        """Gradients are views of the buckets that are reduced: no further buffer."""
        return whole_model(stats, workload)

    def traffic(self, stats: ModelStats, workload: Workload) -> Traffic:
        """Every gradient once per optimizer step, in its own format, however many micro-batches there were."""
        payload = stats.parameters * BYTES[workload.precision.parameter]
        return (Transfer(collective="all_reduce", axis="data", ranks=self.mesh.data_ranks, payload=payload),)

    def build(self, run: Run) -> Engine:
        from strategies.engines.replicate import DDPEngine

        return DDPEngine(
            run,
            bucket_mb=self.bucket_mb,
            find_unused_parameters=self.find_unused_parameters,
            checkpointing=self.activation_checkpointing,
        )
