"""One optimizer step of a traced run: who did what when, small enough to be drawn."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from tracking.sources import Event
from tracking.timeline import joined, length, without

# Parts of a step that a chart 1,000 pixels wide does not show: events that short, and that close, are drawn as one.
INVISIBLE = 1 / 2000


class Bar(BaseModel):
    """An event, or several of one kind that follow each other at once; milliseconds since the step began."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int
    lane: int
    category: str
    name: str
    start_ms: float
    duration_ms: float
    micro_batch: int | None
    events: int


def last_step(trace: Sequence[Event], ranks: Collection[int]) -> list[Bar]:
    """The last step in `trace`, of each of `ranks`."""
    by_rank: dict[int, list[Event]] = defaultdict(list)
    shown = (event for event in trace if event.rank in ranks)
    for event in sorted(shown, key=lambda event: event.start):
        by_rank[event.rank].append(event)
    steps = {rank: _steps(events) for rank, events in by_rank.items()}
    count = min((len(parts) for parts in steps.values()), default=0)
    events = [event for parts in steps.values() for event in parts[count - 1]] if count else []
    if not events:
        return []
    begin = min(event.start for event in events)
    shortest = INVISIBLE * (max(event.start + event.duration for event in events) - begin)
    lanes: dict[tuple[int, int, str], list[Event]] = defaultdict(list)
    for event in events:
        lanes[event.rank, event.lane, event.category].append(event)
    bars = [bar for lane in lanes.values() for bar in _joined(lane, begin, shortest)]
    return sorted(bars, key=lambda bar: (bar.rank, bar.lane, bar.start_ms))


def spent_ms(bars: Iterable[Bar], rank: int, category: str) -> float:
    """How long a rank was at it; while it waits in the middle of something, it is at nothing but waiting."""
    own = [bar for bar in bars if bar.rank == rank]
    spent = _intervals(bar for bar in own if bar.category == category)
    if category in ("idle", "collective"):
        return length(spent)
    return length(without(spent, _intervals(bar for bar in own if bar.category == "idle")))


def idle_share(bars: Sequence[Bar], rank: int) -> float:
    """Part of the step that is drawn in which a rank waited: in a pipeline its bubble."""
    begin, end = min(bar.start_ms for bar in bars), max(bar.start_ms + bar.duration_ms for bar in bars)
    return spent_ms(bars, rank, "idle") / (end - begin) if end > begin else 0.0


def _intervals(bars: Iterable[Bar]) -> list[tuple[float, float]]:
    return joined((bar.start_ms, bar.start_ms + bar.duration_ms) for bar in bars)


def _steps(events: Iterable[Event]) -> list[list[Event]]:
    """One rank's events cut into steps: the next begins with the first data or forward after an optimizer's work."""
    steps: list[list[Event]] = [[]]
    stepped = False
    for event in events:
        if stepped and event.category in ("data", "forward"):
            steps.append([])
            stepped = False
        stepped = stepped or event.category == "optimizer"
        steps[-1].append(event)
    return steps


def _joined(events: Sequence[Event], begin: float, shortest: float) -> list[Bar]:
    """Bars of one lane's events of one category, in the order of their start."""
    groups: list[list[Event]] = []
    for event in events:
        if groups and _blend(groups[-1][-1], event, shortest):
            groups[-1].append(event)
        else:
            groups.append([event])
    return [_bar(group, begin) for group in groups]


def _blend(left: Event, right: Event, shortest: float) -> bool:
    gap = right.start - (left.start + left.duration)
    same = left.details.get("micro_batch") == right.details.get("micro_batch")
    return same and gap < shortest and min(left.duration, right.duration) < shortest


def _bar(group: Sequence[Event], begin: float) -> Bar:
    first = group[0]
    end = max(event.start + event.duration for event in group)
    names = list(dict.fromkeys(event.name for event in group))
    return Bar(
        rank=first.rank,
        lane=first.lane,
        category=first.category,
        name=", ".join(names[:3]) + (" and others" if len(names) > 3 else ""),
        start_ms=round((first.start - begin) / 1000, 4),
        duration_ms=round((end - first.start) / 1000, 4),
        micro_batch=first.details.get("micro_batch"),
        events=len(group),
    )
