"""Grid: ranks laid out over pipe x data x tensor, torch-native; fsdp, tensor, pipeline, 2d and 3d are presets of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from models.plan import Chain, ParallelPlan
from strategies import grid_costs
from strategies.schedules import SCHEDULES, Name, Schedule, bubble
from strategies.spec import REHEARSAL_RANKS, STRICT, Memory, Run, Strategy, Traffic, Workload

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import Strategy as Engine

    from models.stats import ModelStats


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Grid(Strategy):
    """Pipeline stages x data parallelism, sharded or replicated, x tensor parallelism; an axis of 1 is not there."""

    # data axis
    shard_ranks: PositiveInt | Literal["auto"] = "auto"  # ranks that share one copy of the state; auto: the data axis
    reshard_after_forward: bool | Literal["auto"] = (
        "auto"  # gather weights again for backward; auto: without a pipeline
    )
    cpu_offload: bool = False  # the state lies in the host's memory, weights come to the device when they are used
    # tensor axis
    sequence_parallel: bool = True  # where the plan allows it: activations between split modules are split, too
    loss_parallel: bool = True  # where the plan allows it: logits stay split over the vocabulary
    # pipe axis
    schedule: Name = "1f1b"
    micro_batches: PositiveInt = 4  # parts that a data rank's micro-batch is cut into
    stages_per_rank: PositiveInt | Literal["auto"] = "auto"  # auto: as few as the schedule takes

    @property
    def cuts_at(self) -> frozenset[str]:
        return frozenset({"blocks", "tensor"} if self.mesh.tensor != 1 else {"blocks"})

    @property
    def rehearsal_ranks(self) -> int:
        """Two groups of shards where the data axis is open, so that there is something to replicate over."""
        if self.mesh.data == "auto" and self.shard_ranks not in ("auto", 1):
            return REHEARSAL_RANKS * int(self.shard_ranks)
        return REHEARSAL_RANKS

    # --- what follows from a resolved mesh --------------------------------------------------------------------------

    @property
    def pipe(self) -> int:
        assert isinstance(self.mesh.pipe, int)
        return self.mesh.pipe

    @property
    def tensor(self) -> int:
        assert isinstance(self.mesh.tensor, int)
        return self.mesh.tensor

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the model between them, besides the pipe and tensor axes."""
        return self.mesh.data_ranks if self.shard_ranks == "auto" else self.shard_ranks

    @property
    def replicas(self) -> int:
        return self.mesh.data_ranks // self.shards

    @property
    def kind(self) -> Schedule:
        return SCHEDULES[self.schedule]

    @property
    def rank_stages(self) -> int:
        """Stages on each pipe rank."""
        if self.pipe == 1:
            return 1
        return (self.kind.stages_per_rank or 2) if self.stages_per_rank == "auto" else self.stages_per_rank

    @property
    def num_stages(self) -> int:
        return self.pipe * self.rank_stages

    @property
    def reshards(self) -> bool:
        return self.pipe == 1 if self.reshard_after_forward == "auto" else self.reshard_after_forward

    # --- conditions -------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        self.check_data_axis()
        if run.precision.compute == "float16":
            raise ValueError(
                f"precision={run.precision.name}: strategy={self.name} does not scale losses; choose precision=bf16, "
                f"or a ZeRO strategy."
            )
        if self.pipe > 1:
            self.check_schedule(run)
            self.check_micro_batches(run)

    def check_data_axis(self) -> None:
        data = self.mesh.data_ranks
        if data % self.shards:
            raise ValueError(
                f"strategy.shard_ranks={self.shard_ranks} does not divide the data axis of {data} ranks; choose a "
                f"divisor of {data}, or launcher.devices={self.mesh.world_size // data * self.shards}."
            )
        if self.cpu_offload and self.shards == 1:
            raise ValueError(
                "strategy.cpu_offload=true moves what is sharded, and nothing is; set it to false, or shard over more "
                "than one rank (strategy.mesh.data, strategy.shard_ranks)."
            )

    def check_schedule(self, run: Run) -> None:
        exact, given = self.kind.stages_per_rank, self.stages_per_rank
        if exact is not None and given not in ("auto", exact):
            raise ValueError(
                f"strategy.stages_per_rank={given}: schedule={self.schedule} takes {exact}; set it to auto, or choose "
                f"schedule=interleaved_1f1b."
            )
        if exact is None and given == 1:
            raise ValueError(
                f"strategy.stages_per_rank=1: schedule={self.schedule} interleaves stages; set it to 2 or more, or "
                f"choose schedule=1f1b."
            )
        if self.kind.splits_backward and run.compile:
            raise ValueError(
                f"compile=true: schedule={self.schedule} takes a backward apart, which a compiled block does not "
                f"allow; choose schedule=1f1b, or compile=false."
            )
        if self.kind.splits_backward and self.reshards and self.shards > 1:
            raise ValueError(
                f"strategy.reshard_after_forward=true: schedule={self.schedule} takes weight gradients after the "
                f"weights would be gone; set it to auto, or choose schedule=1f1b."
            )

    def check_micro_batches(self, run: Run) -> None:
        if self.micro_batches > run.micro_batch_size:
            raise ValueError(
                f"strategy.micro_batches={self.micro_batches} exceeds data.micro_batch_size={run.micro_batch_size}, "
                f"which is cut into them; set strategy.micro_batches={run.micro_batch_size}, or raise "
                f"data.micro_batch_size."
            )
        if self.schedule == "dualpipev" and self.micro_batches < self.num_stages:
            raise ValueError(
                f"strategy.micro_batches={self.micro_batches}: schedule=dualpipev takes at least one for each of the "
                f"{self.num_stages} stages; set it to {self.num_stages}."
            )
        rounds = max(1, self.micro_batches // self.pipe)
        if self.kind.stages_per_rank is None and self.schedule != "looped_bfs" and self.micro_batches % rounds:
            raise ValueError(
                f"strategy.micro_batches={self.micro_batches}: schedule={self.schedule} goes through them in {rounds} "
                f"rounds, which must be of one size; set it to {self.micro_batches // rounds * rounds}."
            )

    def check_plan(self, plan: ParallelPlan, chain: Chain) -> None:
        if len(chain.modules) < self.num_stages:
            raise ValueError(
                f"strategy.mesh.pipe={self.pipe} x {self.rank_stages} stages a rank need {self.num_stages} modules to "
                f"cut between, but the model's plan has {len(chain.modules)}; choose fewer stages, or more layers."
            )
        for key, size in plan.splits.items():
            if size % self.tensor:
                fits = [str(number) for number in range(1, size + 1) if size % number == 0]
                raise ValueError(
                    f"strategy.mesh.tensor={self.tensor} does not divide {key}={size}; choose {', '.join(fits[:-1])} "
                    f"or {fits[-1]}, or another {key}."
                )

    def check_module(self, module: LightningModule, run: Run) -> None:
        from strategies.engines.grid import check_module

        check_module(module, self)

    # --- costs ------------------------------------------------------------------------------------------------------

    def bubble(self, forward: tuple[float, ...] | None = None) -> float:
        """Share of the ranks' time in which they wait, from 0 to 1; takes torch where a schedule is torch's.

        forward: relative times of the stages' forwards; None: all take as long.
        """
        if self.pipe == 1:
            return 0.0
        from strategies.engines.pipeline import order_of

        order = order_of(self.schedule, self.pipe, self.rank_stages, self.micro_batches)
        return bubble(order, self.num_stages, forward or (1.0,) * self.num_stages)

    def memory(self, stats: ModelStats, workload: Workload) -> Memory:
        return grid_costs.memory(self, stats, workload)

    def traffic(self, stats: ModelStats, workload: Workload) -> Traffic:
        return grid_costs.traffic(self, stats, workload)

    def build(self, run: Run) -> Engine:
        from strategies.engines.grid import GridEngine

        return GridEngine(self, run)
