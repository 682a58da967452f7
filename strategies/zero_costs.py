"""What ZeRO's ranks hold and send, as DeepSpeed 0.19.8 does it; tests/strategies/test_zero_bytes.py counts it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.spec import BYTES, Collective, Memory, Traffic, Transfer, Workload

if TYPE_CHECKING:
    from models.stats import ModelStats
    from strategies.zero import Zero


def padded(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple


# --- stages 1 and 2: each optimizer group is one flat tensor, padded to 2N elements, of which a rank owns 1/N ---


def slices(stats: ModelStats, ranks: int) -> list[int]:
    """Elements of each optimizer group that one rank owns."""
    return [padded(sum(stats.sizes[i] for i in group), 2 * ranks) // ranks for group in stats.groups]


def ownership(stats: ModelStats, ranks: int) -> list[set[int]]:
    """For each rank, the positions of the parameters of which it owns a part."""
    owned: list[set[int]] = [set() for _ in range(ranks)]
    for group, size in zip(stats.groups, slices(stats, ranks), strict=True):
        end = 0
        for position in group:
            start, end = end, end + stats.sizes[position]
            for rank in range(start // size, (end - 1) // size + 1):
                owned[rank].add(position)
    return owned


@dataclass
class Replay:
    """Elements of gradients that a rank holds outside of buckets, while backward and DeepSpeed's reductions run.

    Gradients are held whole for every parameter of which the rank owns a part. Those that fit move into the bucket
    when they are handed over, and from there, reduced, into the store of what is owned, which is made at once; a
    gradient larger than the bucket waits for its reduction where it is, and under stage 1 stays there if it is not
    owned.
    """

    sizes: Sequence[int]
    owned: set[int]
    bucket: int
    stage: int

    def __post_init__(self) -> None:
        self.kept = sum(self.sizes[position] for position in self.owned)
        self.loose: set[int] = set()  # gradients that lie in a storage of their own
        self.held = self.peak = 0
        self.waiting: list[int] = []
        self.filled = 0
        self.has_store = False

    def start_after(self, micro_batches: int) -> None:
        """Begin with what micro-batches before have left: all gradients under stage 1, the owned ones under 2."""
        if micro_batches and self.stage == 1:
            self.loose = set(range(len(self.sizes)))
        if micro_batches:
            self.hold(sum(self.sizes) if self.stage == 1 else self.kept)

    def hold(self, elements: int) -> None:
        self.held += elements
        self.peak = max(self.peak, self.held)

    def arrive(self, position: int) -> None:
        """Autograd delivers a gradient, as a tensor of its own or to be added to the one that is there."""
        self.hold(self.sizes[position])
        if position in self.loose:
            self.held -= self.sizes[position]
        self.loose.add(position)

    def drop(self, position: int) -> None:
        if position in self.loose:
            self.loose.remove(position)
            self.held -= self.sizes[position]

    def hand_over(self, position: int) -> None:
        if self.filled + self.sizes[position] > self.bucket:
            self.reduce()
        if self.sizes[position] <= self.bucket:
            self.drop(position)
        self.waiting.append(position)
        self.filled += self.sizes[position]

    def reduce(self) -> None:
        for position in self.waiting:
            if position in self.owned and not self.has_store:
                self.has_store = True
                self.held += self.kept
            if position in self.owned or self.stage == 2:
                self.drop(position)
            self.hold(0)  # after the move: both copies exist for an instant only
        self.waiting, self.filled = [], 0


def backward_peak(spec: Zero, stats: ModelStats, owned: set[int], accumulation: int, bucket: int) -> int:
    """Elements of gradients at their peak in the backward of a step's last micro-batch; layers in reverse order."""
    replay = Replay(stats.sizes, owned, bucket, spec.stage)
    replay.start_after(accumulation - 1)
    streams = spec.stage == 2 or spec.overlap_comm
    for position in reversed(range(len(stats.sizes))):
        replay.arrive(position)
        if streams:
            replay.hand_over(position)
    if not streams:
        for position in (position for group in stats.groups for position in group):
            replay.hand_over(position)
    replay.reduce()
    return replay.peak


def flat_memory(spec: Zero, stats: ModelStats, workload: Workload) -> Memory:
    """Stages 1 and 2; the ZeRO paper's formulas (section 5) with padding, buckets and DeepSpeed's copies."""
    ranks, precision = spec.mesh.data_ranks, workload.precision
    parameter, master = BYTES[precision.parameter], BYTES[precision.master]
    owned = slices(stats, ranks)
    bucket = spec.tune(stats.sizes, precision, on_gpu=workload.on_gpu).bucket
    buckets = (1 + spec.overlap_comm) * bucket * parameter
    copies = sum(owned) * master * (1 + workload.moments)  # a master copy in float32 too
    weights = sum(owned) * ranks * parameter
    by_rank = ownership(stats, ranks)
    kept = [sum(stats.sizes[position] for position in positions) * parameter for positions in by_rank]
    if spec.offload.optimizer == "none":
        backward = [
            backward_peak(spec, stats, positions, workload.accumulation, bucket) * parameter for positions in by_rank
        ]
        step = [own + owned[0] * master for own in kept]  # the first group's, flat, beside all that is kept
        return Memory(parameters=weights, gradients=max(backward + step), optimizer=copies, buffers=buckets)
    # On the host: gradients in the master's format, and what accumulates there; staging copies on both sides.
    accumulated = max(kept) if spec.stage == 2 and workload.accumulation > 1 else 0
    gradients = sum(owned) * master + accumulated
    staging = (sum(owned) + max(stats.sizes)) * parameter
    return Memory(
        parameters=weights,
        gradients=gradients,
        optimizer=copies,
        buffers=buckets + staging + max(stats.sizes) * parameter,
        host=gradients + copies + staging,
    )


# --- stage 3: each parameter is padded to N elements, of which a rank owns 1/N ---


def split(sizes: Iterable[int], whole_below: int, ranks: int) -> tuple[int, int]:
    """Padded elements of the parameters that are sharded, and of those that stay whole."""
    sizes = list(sizes)
    sharded = sum(padded(size, ranks) for size in sizes if size > whole_below)
    return sharded, sum(padded(size, ranks) for size in sizes if size <= whole_below)


def largest_unit(stats: ModelStats, *, by_block: bool) -> int:
    """Elements of the most that is there at once: of a block where the plan has some, or of one layer's parameters."""
    units = stats.parameters_by_unit.values() if by_block else ()
    return max([*units, *stats.sizes])


def sharded_memory(spec: Zero, stats: ModelStats, workload: Workload) -> Memory:
    """Stage 3; a bucket and the sum of gradients are held all the time."""
    ranks, precision = spec.mesh.data_ranks, workload.precision
    parameter, master = BYTES[precision.parameter], BYTES[precision.master]
    tuning = spec.tune(stats.sizes, precision, on_gpu=workload.on_gpu)
    sharded, whole = split(stats.sizes, tuning.whole_below, ranks)
    owned = (sharded + whole) // ranks
    unit = largest_unit(stats, by_block=spec.gathers_blocks)
    # A forward that runs again in backward keeps what it gathers, layer by layer, until the block is done.
    gathered = largest_unit(stats, by_block=spec.gathers_blocks or spec.activation_checkpointing != "none")
    offloads = spec.offload.optimizer != "none"
    # A unit's fresh gradients in backward; in the step, a sub-group's in the master's format, on the host all of them,
    # for good.
    fresh = unit * parameter
    step = (owned if offloads else min(owned, tuning.sub_group)) * master
    gradients = owned * parameter + (step + fresh if offloads else max(fresh, step))
    copies = owned * master * (1 + workload.moments)  # a master copy in float32 too
    shards = owned * parameter
    lies_in = {"cpu": 0, "nvme": 0, "none": 0}
    lies_in[spec.offload.optimizer] += copies + gradients - fresh
    lies_in[spec.offload.parameters] += shards
    return Memory(
        parameters=shards + whole * parameter,
        gradients=gradients,
        optimizer=copies,
        buffers=(tuning.bucket + max(gathered, tuning.live if tuning.prefetch else 0)) * parameter,
        host=lies_in["cpu"],
        disk=lies_in["nvme"],
    )


# --- traffic ---


def traffic(spec: Zero, stats: ModelStats, workload: Workload) -> Traffic:
    """Stage 1 reduces gradients once per step, stages 2 and 3 every micro-batch."""
    ranks, precision = spec.mesh.data_ranks, workload.precision
    reduced = BYTES[spec.communication_dtype or precision.reduce]
    parameter, times = BYTES[precision.parameter], workload.accumulation

    def over_data(collective: Collective, payload: int) -> Transfer:
        return Transfer(collective=collective, axis="data", ranks=ranks, payload=payload)

    if spec.stage < 3:
        reductions = times if spec.stage == 2 else 1
        return (
            over_data("reduce" if spec.reduce_to_owner else "all_reduce", reductions * stats.parameters * reduced),
            over_data("all_gather", sum(slices(stats, ranks)) * ranks * parameter),
        )
    whole_below = spec.tune(stats.sizes, precision, on_gpu=workload.on_gpu).whole_below
    sharded, whole = split(stats.sizes, whole_below, ranks)
    again, _ = split(stats.reused, whole_below, ranks)
    gathers = 3 if spec.gathers_layers_again else 2
    return (
        over_data("reduce_scatter", times * (sharded + whole) * reduced),
        # In forward and again in backward, in every place of the net; what stays whole, after the step.
        over_data("all_gather", (gathers * times * (sharded + again) + whole) * parameter),
    )
