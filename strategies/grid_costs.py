"""What a grid's ranks hold and send; tests/strategies/test_grid_bytes.py counts it.

The ranks of one pipe rank hold and send alike, but for shards of sizes that do not divide: what is said is then the
first one's, which has the largest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Literal

from strategies.grid_layout import Group, Layout, Stage
from strategies.spec import BYTES, Collective, Memory, Traffic, Transfer, Workload

if TYPE_CHECKING:
    from models.stats import ModelStats, Part, Passed
    from strategies.grid import Grid

BUCKET_BYTES = 25 * 2**20  # of gradients that are averaged at once where nothing is sharded: engines/shards.py

Axis = Literal["pipe", "data", "tensor"]
Sent = Iterator[tuple[Collective, Axis, int, int]]  # with ranks and payload
Exchanges = Iterator[tuple[Collective, int]]  # over the tensor axis, with the payload per sample


HEADER_BYTES = 512  # go ahead of each activation and tell its shape: engines/link.py, HEADER_WORDS


def memory(grid: Grid, stats: ModelStats, workload: Workload) -> Memory:
    """Of the pipe rank that holds most."""
    layout = Layout(grid, stats)
    held = (rank_memory(layout, workload, rank) for rank in range(grid.pipe))
    return max(held, key=lambda memory: memory.total)


def traffic(grid: Grid, stats: ModelStats, workload: Workload) -> Traffic:
    """Of the pipe rank that sends and receives most."""
    layout = Layout(grid, stats)
    sent = (rank_traffic(layout, workload, rank) for rank in range(grid.pipe))
    return max(sent, key=lambda transfers: sum(map(moved, transfers)))


def moved(transfer: Transfer) -> float:
    """Bytes that a rank sends and receives; who sends in a ring receives as much."""
    return transfer.payload if transfer.collective in ("send", "recv") else 2 * transfer.wire_bytes


# --- memory ---


def rank_memory(layout: Layout, workload: Workload, pipe_rank: int) -> Memory:
    """Of one pipe rank."""
    grid, precision = layout.grid, workload.precision
    parameter, master = BYTES[precision.parameter], BYTES[precision.master]
    stages = layout.stages_of(pipe_rank)
    owned = sum(group.shard for stage in stages for group in stage.all_groups) + layout.outside.whole
    # Where the optimizer works on a wider copy of the weights, the gradient is widened for its step.
    in_step = owned * (parameter + precision.copies_master * master)
    optimizer = owned * master * (workload.moments + precision.copies_master)
    return Memory(
        parameters=owned * parameter,
        gradients=max(in_step, gradients_in_backward(grid, stages, workload)),
        optimizer=optimizer,
        buffers=buffers(layout, pipe_rank, workload),
        host=owned * parameter + in_step + optimizer if grid.cpu_offload else 0,
    )


def gradients_in_backward(grid: Grid, stages: Sequence[Stage], workload: Workload) -> int:
    """Bytes of the gradients of what is sharded, at their peak.

    A group's are whole until they are reduced: behind its own backward or, in a pipeline, at the step's end.
    """
    parameter, reduce = BYTES[workload.precision.parameter], BYTES[workload.precision.reduce]
    groups = [group for stage in stages for group in stage.all_groups]
    if grid.pipe > 1:
        return sum(group.whole for group in groups) * reduce if grid.shards > 1 else 0
    (stage,) = stages
    kept = sum(group.shard for group in groups) if workload.accumulation > 1 else 0
    peak = 0
    for group in reversed(stage.groups):
        peak = max(peak, kept + group.whole + stage.root.whole)
        kept += group.shard if workload.accumulation == 1 else 0
    return max(peak, kept + stage.root.whole) * parameter if grid.shards > 1 else 0


def buffers(layout: Layout, pipe_rank: int, workload: Workload) -> int:
    """Bytes of communication buffers at their peak: gathered parameters, flattened gradients, copies of shared ones."""
    grid, precision = layout.grid, workload.precision
    parameter, reduce = BYTES[precision.parameter], BYTES[precision.reduce]
    stages = layout.stages_of(pipe_rank)
    peaks = [(len(tie.elsewhere) + 1) * tie.elements * parameter for tie in layout.ties(pipe_rank) if tie.elsewhere]
    peaks.append(sum(map(layout.partial, stages)) * parameter)
    averaged = [layout.outside]
    if grid.shards > 1:
        peaks.append((gathered_in_pipeline if grid.pipe > 1 else gathered_by_turns)(grid, stages, parameter, reduce))
    else:
        averaged += [group for stage in stages for group in stage.all_groups]
    if grid.mesh.data_ranks > 1:
        peaks.append(largest_bucket(averaged, parameter) // parameter * reduce)
    return max(peaks)


def largest_bucket(groups: Iterable[Group], parameter: int) -> int:
    """Bytes of gradients that are flattened at once, up to BUCKET_BYTES of them."""
    largest = filled = 0
    for size in (math.prod(shape) * parameter for group in groups for shape in group.shapes):
        filled = size if filled + size > BUCKET_BYTES else filled + size
        largest = max(largest, filled)
    return largest


def gathered_by_turns(grid: Grid, stages: Sequence[Stage], parameter: int, reduce: int) -> int:
    """FSDP without a pipeline: weights of one group, or of all before it, while those of the next arrive.

    They arrive flat. In forward this copy is kept until the next one is there. In backward it goes when it is unpacked,
    but the next one is fetched ahead, and the gradients that were flattened last are still there.
    """
    (stage,) = stages
    root = stage.root.padded * parameter
    weights = [group.padded * parameter for group in stage.groups]
    before = [0, *weights[:-1]]
    reduced = [*(group.padded * reduce for group in stage.groups[1:]), 0]
    held = [root] * len(weights) if grid.reshards else [root + total for total in accumulate(before)]
    peak = 2 * root
    for kept, own, flat, late in zip(held, weights, before, reduced, strict=True):
        peak = max(peak, kept + flat + own, kept + 2 * own)
        if grid.reshards:
            peak = max(peak, kept + own + max(flat, own) + late)
    return peak


def gathered_in_pipeline(grid: Grid, stages: Sequence[Stage], parameter: int, reduce: int) -> int:
    """All weights of a rank's stages, and what arrives last, flat; at the end weights make room for flat gradients."""
    groups = [group for stage in stages for group in stage.all_groups]
    if (
        grid.reshards
    ):  # for backward, the first group comes last; the head, called behind its stage, leaves its flat copy
        arriving = max([*stage.groups, stage.root][0].padded for stage in stages)
        arriving += sum([stage.root, *stage.groups][-1].padded for stage in stages if stage.is_last)
    else:  # the last but one leaves its flat copy until the last is there
        arriving = max(group.padded for group in stages[-1].all_groups[-2:])
    peak = weights = sum(group.padded for group in groups) * parameter
    peak += arriving * parameter
    for group in groups:
        weights -= group.padded * parameter
        peak = max(peak, weights + group.padded * reduce)
    return peak


# --- traffic ---


def rank_traffic(layout: Layout, workload: Workload, pipe_rank: int) -> Traffic:
    """Of one pipe rank."""
    sent: Counter[tuple[Collective, Axis, int]] = Counter()
    for over_axis in (over_data, over_tensor, over_pipe):
        for collective, axis, ranks, payload in over_axis(layout, workload, pipe_rank):
            sent[collective, axis, ranks] += payload
    return tuple(
        Transfer(collective=collective, axis=axis, ranks=ranks, payload=payload)
        for (collective, axis, ranks), payload in sent.items()
        if payload
    )


def over_data(layout: Layout, workload: Workload, pipe_rank: int) -> Sent:
    """Gradients are reduced for every micro-batch, in a pipeline or between replicas once per step."""
    grid, data = layout.grid, layout.grid.mesh.data_ranks
    parameter, reduce = BYTES[workload.precision.parameter], BYTES[workload.precision.reduce]
    if data == 1:
        return
    yield "all_reduce", "data", data, layout.outside.whole * reduce
    reductions = workload.accumulation if grid.pipe == 1 else 1
    for stage in layout.stages_of(pipe_rank):
        for group in stage.all_groups:
            if grid.shards == 1:
                yield "all_reduce", "data", data, group.whole * reduce
                continue
            # The root, and what forward gathers last where backward follows at once, stay gathered until then.
            stays = group is stage.root or (grid.pipe == 1 and group is stage.groups[-1])
            times = reductions if stays else gathers(grid, workload)
            yield "all_gather", "data", grid.shards, times * group.padded * parameter
            yield "reduce_scatter", "data", grid.shards, reductions * group.padded * reduce
            if grid.replicas > 1:
                yield "all_reduce", "data", grid.replicas, group.shard * reduce


def gathers(grid: Grid, workload: Workload) -> int:
    """How often a group of weights is gathered in a step."""
    if grid.pipe == 1:
        return workload.accumulation * (2 if grid.reshards else 1)
    if not grid.reshards:
        return 1
    # They are let go behind each forward and stay behind a backward: what comes after a forward gathers them again.
    return 1 + workload.accumulation * min(grid.micro_batches, workload.micro_batch_size)


def over_pipe(layout: Layout, workload: Workload, pipe_rank: int) -> Sent:
    """Activations to the next stage, their gradients back; gradients of parameters that stand in several stages."""
    ranks = layout.grid.pipe
    samples = workload.micro_batch_size * workload.accumulation
    for number, stage in enumerate(layout.stages[:-1]):
        here, there = layout.pipe_rank_of(number), layout.pipe_rank_of(number + 1)
        if here == there or pipe_rank not in (here, there):
            continue
        passed = layout.stats.units[stage.units[-1]].gives
        back = samples * passed.elements * width(passed, workload) // layout.parts_between(stage)
        headers = workload.accumulation * min(layout.grid.micro_batches, workload.micro_batch_size) * HEADER_BYTES
        on = back + samples * passed.other_bytes + headers
        yield "send", "pipe", ranks, on if here == pipe_rank else back
        yield "recv", "pipe", ranks, back if here == pipe_rank else on
    for tie in layout.ties(pipe_rank):
        payload = tie.elements * BYTES[workload.precision.parameter]
        yield "send", "pipe", ranks, payload * len(tie.here) * len(set(map(layout.pipe_rank_of, tie.elsewhere)))
        yield "recv", "pipe", ranks, payload * len(tie.elsewhere)


def width(passed: Passed, workload: Workload) -> int:
    """Bytes of an element."""
    return BYTES[workload.precision.compute if passed.narrow else workload.precision.parameter]


def over_tensor(layout: Layout, workload: Workload, pipe_rank: int) -> Sent:
    """What the modules of each style add up or gather, and sums of gradients of which each rank has a part."""
    grid = layout.grid
    if grid.tensor == 1:
        return
    samples = workload.micro_batch_size * workload.accumulation
    # FSDP sums the parts before it reduces, for every micro-batch where there is no pipeline.
    sums = workload.accumulation if grid.shards > 1 and grid.pipe == 1 else 1
    for stage in layout.stages_of(pipe_rank):
        exchanges = chain(forwards(layout, workload, stage.units), backwards(layout, workload, stage.units))
        for collective, payload in exchanges:
            yield collective, "tensor", grid.tensor, samples * payload
        yield "all_reduce", "tensor", grid.tensor, sums * layout.partial(stage) * BYTES[workload.precision.parameter]


def forwards(layout: Layout, workload: Workload, units: Sequence[str]) -> Exchanges:
    """Of forwards, and of those that run again in backward: these end before the last module's outputs are added up."""
    for unit in units:
        own = [[*forward(layout, workload, unit, part)] for part in layout.parts([unit])]
        yield from chain(*own, *(own[:-1] if unit in layout.checkpointed else []))
        if layout.sequence_units[-1:] == (unit,) and not layout.is_norm(unit):
            gives = layout.stats.units[unit].gives
            yield "all_gather", gives.elements * width(gives, workload)


def forward(layout: Layout, workload: Workload, unit: str, part: Part) -> Exchanges:
    splits_sequence = unit in layout.sequence_units
    payload = part.gives.elements * width(part.gives, workload)
    match part.style:
        case "embedding":
            yield "all_reduce", payload
        case "rowwise":
            yield "reduce_scatter" if splits_sequence else "all_reduce", payload
        case "sequence" if splits_sequence:
            yield "all_gather", payload
        case "vocabulary" if layout.loss_is_split(part):
            # Of each row its largest logit, the sum of its exponentials and its target's, in the loss's format.
            rows = part.gives.elements // layout.stats.shapes[part.parameters[0]][0]
            yield "all_reduce", 3 * rows * max(BYTES["float32"], width(part.gives, workload))
        case "vocabulary":
            yield "all_gather", payload


def backwards(layout: Layout, workload: Workload, units: Sequence[str]) -> Exchanges:
    """Of backwards: a split module has a part of its input's gradient; those of all that a norm feeds add up once."""
    feeder: tuple[str, Part] | None = None  # the unit and the module of style sequence or whole that came last
    summed: set[str] = set()
    for unit in units:
        if layout.sequence_units[:1] == (unit,):
            takes = layout.stats.units[unit].takes
            yield "all_gather", takes.elements * width(takes, workload)
        for part in layout.parts([unit]):
            match part.style:
                case "sequence" | "whole":
                    feeder = unit, part
                case "colwise" | "vocabulary":
                    source, passed = (feeder[1], feeder[1].gives) if feeder else (part, part.takes)
                    scatters = feeder is not None and feeder[0] in layout.sequence_units and source.style == "sequence"
                    if source.name not in summed:
                        summed.add(source.name)
                        yield "reduce_scatter" if scatters else "all_reduce", passed.elements * width(passed, workload)
                case "rowwise" if unit in layout.sequence_units:
                    yield "all_gather", part.gives.elements * width(part.gives, workload)
                case None:
                    feeder = None
        # What comes of a pipeline's last stage is whole before the net's last unit is called.
        if not (feeder and feeder[1].name == unit) or (layout.grid.pipe > 1 and unit == layout.stats.chain.modules[-2]):
            feeder = None
