"""What the ranks of a run have each traced of the same steps, on one clock: events to look at, and their sums."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from tracking.record import Collective, Memory

Axis = Literal["pipe", "data", "tensor", "mixed"]
AXES: tuple[Literal["pipe", "data", "tensor"], ...] = ("pipe", "data", "tensor")  # ranks are numbered in this order
Interval = tuple[float, float]  # seconds: begin, end
COMPUTE, COMMUNICATION = 0, 1  # lanes of trace.json; collectives that overlap have further ones
# Who waits no longer than this for a collective waits for nothing: it is over already.
NO_WAIT_S = 0.001
# A wait that close behind the begin of a forward or backward is for what it needs from elsewhere.
AT_BEGIN_S = 0.002


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Span(_Schema):
    """A stretch of one rank's work."""

    category: Literal["forward", "backward", "weight", "optimizer", "data"]
    begin: float
    end: float
    micro_batch: int | None = None
    stage: int | None = None


class TracedCall(_Schema):
    """A collective that one rank has called; seconds on that rank's clock."""

    collective: str
    group: str
    payload_bytes: int
    called: float
    done: float
    waited_since: float | None  # from when on the rank waited for it, if its end was seen by that alone
    peer: tuple[int, int, int] | None


class TracedStep(_Schema):
    """One optimizer step of one rank; `spread` is by how many seconds all its times may be too early."""

    step: int
    begin: float
    end: float
    spread: float = 0.0
    spans: list[Span]
    waits: list[Interval]
    calls: list[TracedCall]


class RankTrace(_Schema):
    """What one rank has traced.

    node: the machine, whose clock all of its ranks share. moments: when this rank left a number of barriers, which all
    ranks leave at once: so far are clocks apart. groups: the ranks of each process group.
    """

    rank: int
    node: int
    moments: list[float]
    memory: Memory | None
    memory_limit: int
    groups: dict[str, tuple[int, ...]]
    steps: list[TracedStep]

    @classmethod
    def load_all(cls, run_dir: Path, world_size: int) -> list[RankTrace]:
        return [cls.model_validate_json(trace_path(run_dir, rank).read_text()) for rank in range(world_size)]


def trace_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"trace.{rank}.json"


def offsets(traces: Sequence[RankTrace]) -> list[float]:
    """For each rank, the seconds by which its clock is ahead of rank 0's."""
    first = traces[0]
    return [
        0.0
        if trace.node == first.node
        else median(moment - here for moment, here in zip(trace.moments, first.moments, strict=True))
        for trace in traces
    ]


class Timeline:
    """The traced steps of all ranks.

    A collective is under way from when the last of its ranks has called it: before that nothing can move, and whoever
    waits for it is idle. A send is over when it has been received. Of some works gloo tells the end only to those who
    wait: what is over before that counts as no time, as it cost none.
    """

    def __init__(self, traces: Sequence[RankTrace], mesh: Mapping[str, int]) -> None:
        self.traces, self.mesh = traces, mesh
        self.offsets = offsets(traces)
        self.num_steps = len(traces[0].steps)
        self.under_way: list[list[list[Interval]]] = [  # by step, rank and call
            self._moving(number) for number in range(self.num_steps)
        ]

    def _moving(self, number: int) -> list[list[Interval]]:
        steps = [trace.steps[number] for trace in self.traces]
        keys = [list(names_of(step.calls, trace.groups)) for step, trace in zip(steps, self.traces, strict=True)]
        begins: dict[tuple[Any, ...], float] = {}
        received: dict[tuple[Any, ...], tuple[int, TracedCall]] = {}
        for rank, step in enumerate(steps):
            for key, call in zip(keys[rank], step.calls, strict=True):
                called = call.called - self.offsets[rank]
                begins[key] = max(begins.get(key, called), called)
                if call.collective == "recv":
                    received[key] = rank, call
        return [
            [
                self._interval(begins[key], *(received.get(key, (rank, call)) if is_send(call) else (rank, call)))
                for key, call in zip(keys[rank], step.calls, strict=True)
            ]
            for rank, step in enumerate(steps)
        ]

    def _interval(self, begin: float, rank: int, call: TracedCall) -> Interval:
        """Of a call that all have made since `begin`, and of which this rank knows the end."""
        end = call.done - self.offsets[rank]
        if call.waited_since is not None:
            since = call.waited_since - self.offsets[rank]
            end = begin if begin < since and end - since < NO_WAIT_S else end
        return min(begin, end), end

    def parts(self, rank: int) -> Iterator[tuple[TracedStep, list[Interval]]]:
        """Each step of a rank, and when each of its calls was under way."""
        for number, step in enumerate(self.traces[rank].steps):
            yield step, self.under_way[number][rank]

    def shares(self, rank: int) -> tuple[float, float]:
        """Parts of a rank's steps in which it waited, and in which it waited while nothing was under way."""
        total = waited = idle = 0.0
        for step, moving in self.parts(rank):
            shift = self.offsets[rank]
            waits = joined((begin - shift, end - shift) for begin, end in step.waits)
            total += step.end - step.begin
            waited += length(waits)
            idle += length(without(waits, joined(moving)))
        return waited / total, idle / total

    def traffic(self, rank: int) -> list[Collective]:
        """What a rank hands to each kind of collective in a step."""
        # A group of one rank moves nothing.
        groups = {name: ranks for name, ranks in self.traces[rank].groups.items() if len(ranks) > 1}
        lies = {name: (axis_of(ranks, self.mesh), len(ranks)) for name, ranks in groups.items()}

        def kind_of(call: TracedCall) -> tuple[str, Axis, int]:
            return call.collective, *lies[call.group]

        sent: list[TracedCall] = []
        under_way: dict[tuple[str, Axis, int], list[Interval]] = defaultdict(list)
        for step, moving in self.parts(rank):
            for call, interval in zip(step.calls, moving, strict=True):
                if call.group in groups:
                    sent.append(call)
                    under_way[kind_of(call)].append(interval)
        return [
            Collective(
                collective=collective,
                axis=axis,
                ranks=ranks,
                calls=count.calls / self.num_steps,
                payload=count.payload_bytes / self.num_steps,
                seconds=length(joined(under_way[collective, axis, ranks])) / self.num_steps,
            )
            for (collective, axis, ranks), count in counts_of(sent, kind_of).items()
        ]

    def events(self) -> Iterator[dict[str, Any]]:
        """In Chrome's trace format; microseconds since the first step of the first rank began."""
        start = min(trace.steps[0].begin - offset for trace, offset in zip(self.traces, self.offsets, strict=True))
        for trace in self.traces:
            rank = trace.rank
            yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
            parts = [part for step, moving in self.parts(rank) for part in self._stretches(rank, step, moving)]
            for lane in range(1 + max((part[0] for part in parts), default=COMMUNICATION)):
                name = "compute" if lane == COMPUTE else f"communication {lane}"
                yield {"ph": "M", "pid": rank, "tid": lane, "name": "thread_name", "args": {"name": name}}
            for lane, category, name, (begin, end), arguments in parts:
                yield {
                    "ph": "X",
                    "pid": rank,
                    "tid": lane,
                    "cat": category,
                    "name": name,
                    "ts": round(1e6 * (begin - start), 3),
                    "dur": round(1e6 * max(0.0, end - begin), 3),
                    "args": arguments,
                }

    def _stretches(
        self, rank: int, step: TracedStep, moving: Sequence[Interval]
    ) -> Iterator[tuple[int, str, str, Interval, dict[str, Any]]]:
        shift = self.offsets[rank]
        waits = joined(step.waits)
        for span in step.spans:
            where = {"micro_batch": span.micro_batch, "stage": span.stage}
            arguments = {key: value for key, value in where.items() if value is not None}
            begin = span.begin if span.category == "data" else behind_waits(span.begin, waits)
            yield COMPUTE, span.category, span.category, (begin - shift, span.end - shift), arguments
        for begin, end in waits:
            yield COMPUTE, "idle", "wait", (begin - shift, end - shift), {}
        taken_until: list[float] = []  # by lane of communication
        for interval, call in sorted(zip(moving, step.calls, strict=True), key=lambda pair: pair[0]):
            ranks = self.traces[rank].groups[call.group]
            if len(ranks) > 1:
                sent = {"bytes": call.payload_bytes, "axis": axis_of(ranks, self.mesh)}
                lane = next((lane for lane, end in enumerate(taken_until) if end <= interval[0]), len(taken_until))
                taken_until[lane:] = [interval[1], *taken_until[lane + 1 :]]
                yield COMMUNICATION + lane, "collective", call.collective, interval, sent

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"traceEvents": list(self.events()), "displayTimeUnit": "ms"}))

    def results(self) -> dict[str, Any]:
        """Those fields of a record's Results that come of tracing."""
        memory = [trace.memory for trace in self.traces]
        shares = [self.shares(rank) for rank in range(len(self.traces))]
        return {
            "memory": memory if all(memory) else [],
            "memory_limit": min(trace.memory_limit for trace in self.traces),
            "traffic": [self.traffic(rank) for rank in range(len(self.traces))],
            "wait_share": [waited for waited, _ in shares],
            "idle_share": [idle for _, idle in shares],
            "traced_steps": [step.step for step in self.traces[0].steps],
        }


class Count(NamedTuple):
    """How often this rank took part, and how many bytes were its payload."""

    calls: int
    payload_bytes: int


class HasPayload(Protocol):
    @property
    def payload_bytes(self) -> int: ...


One = TypeVar("One", bound=HasPayload)
Kind = TypeVar("Kind", bound=Hashable)


def counts_of(calls: Iterable[One], kind_of: Callable[[One], Kind]) -> dict[Kind, Count]:
    """The calls of each kind and their bytes, in the order of first calls."""
    counts: dict[Kind, Count] = {}
    for call in calls:
        kind = kind_of(call)
        so_far = counts.get(kind, Count(0, 0))
        counts[kind] = Count(so_far.calls + 1, so_far.payload_bytes + call.payload_bytes)
    return counts


def is_send(call: TracedCall) -> bool:
    return call.collective == "send"


def names_of(calls: Iterable[TracedCall], groups: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Any, ...]]:
    """What a call is named by all of its ranks: the how-manieth of its group, or between two of them with one tag."""
    counts: dict[tuple[Any, ...], int] = defaultdict(int)
    for call in calls:
        name = (call.group, groups[call.group][:1], call.peer)
        yield (*name, counts[name])
        counts[name] += 1


def axis_of(ranks: Sequence[int], mesh: Mapping[str, int]) -> Axis:
    """The mesh axis along which a group's ranks lie; `mixed` for several."""
    places = [place_of(rank, mesh) for rank in ranks]
    varying = [axis for axis, along in zip(AXES, zip(*places, strict=True), strict=True) if len(set(along)) > 1]
    return varying[0] if len(varying) == 1 else "mixed"


def place_of(rank: int, mesh: Mapping[str, int]) -> tuple[int, int, int]:
    rest, tensor = divmod(rank, mesh["tensor"])
    pipe, data = divmod(rest, mesh["data"])
    return pipe, data, tensor


def behind_waits(begin: float, waits: Iterable[Interval]) -> float:
    """When work really begins that first waits for what it needs; `waits` in order."""
    for wait_begin, wait_end in waits:
        if begin <= wait_begin <= begin + AT_BEGIN_S:
            begin = wait_end
    return begin


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that neither meet nor overlap, in order."""
    result: list[Interval] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif end > begin:
            result.append((begin, end))
    return result


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of `intervals` lies in none of `others`; both joined."""
    result = []
    for begin, end in intervals:
        for other_begin, other_end in others:
            if begin < other_end and other_begin < end:
                if other_begin > begin:
                    result.append((begin, other_begin))
                begin = other_end
        if begin < end:
            result.append((begin, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
