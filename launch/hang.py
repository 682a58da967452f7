"""Which rank a run that hangs waits for, judged by where each rank says that it stands. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

SHOWN_PLACES = 3  # of ranks that all stand somewhere else: one line is to remain one


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stood when it was asked."""

    rank: int
    time: float  # time.time() of the answer
    silent_s: float  # since it last made progress
    beats: int  # how often it has made progress
    collectives: dict[str, int]  # issued so far, by the names of the groups that this rank is a member of
    waits: bool  # whether its main thread is inside a collective, or in a backward that issues them
    waits_in_call: bool  # whether that is sure of a rank that waits; else a main thread may wait anywhere
    during: str  # "step 5", "validation after step 4"
    place: str  # the innermost function of ours or the user's: "training_step (hanging.py:12)"

    def write(self, run_dir: Path) -> None:
        """A reader sees the whole file or none."""
        path = hang_path(run_dir, self.rank)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)

    @property
    def text(self) -> str:
        return f"in {self.during}, {self.place}"


@dataclass(frozen=True, kw_only=True)
class Hang:
    """What is to be said of a run that hangs."""

    rank: int | None  # None if none lags behind the others
    cause: str
    time: float = field(default_factory=time.time)


def hang_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "ranks" / f"{rank}.hang.json"


def ended_path(run_dir: Path, rank: int) -> Path:
    """Tells the others that this rank has finished, or said all that it knows, and needs no other rank any longer."""
    return run_dir / "ranks" / f"{rank}.ended"


def is_reported(run_dir: Path) -> bool:
    """Whether some rank has said that the run hangs."""
    return next((run_dir / "ranks").glob("*.hang.json"), None) is not None


def read_standings(run_dir: Path) -> list[Standing]:
    found = [Standing(**json.loads(path.read_text())) for path in (run_dir / "ranks").glob("*.hang.json")]
    return sorted(found, key=lambda standing: standing.rank)


def silent_ranks(run_dir: Path, world_size: int, standings: Sequence[Standing]) -> list[int]:
    """Ranks that have neither answered nor finished."""
    answered = {standing.rank for standing in standings}
    return [rank for rank in range(world_size) if rank not in answered and not ended_path(run_dir, rank).exists()]


def judge(run_dir: Path, world_size: int) -> Hang | None:
    """The rank that the others wait for; None if no rank has said that the run hangs."""
    standings = read_standings(run_dir)
    if not standings:
        return None
    first = min(standing.time for standing in standings)
    if silent := silent_ranks(run_dir, world_size, standings):
        waited_s = max(standing.silent_s for standing in standings)
        others = f" (nor {ranks_text(silent[1:])})" if silent[1:] else ""
        last = max(standings, key=lambda standing: standing.beats)
        cause = f"hangs: it has not answered for {waited_s:.0f} s{others}; the others wait for it {last.text}"
        return Hang(rank=silent[0], cause=cause, time=first)
    lagging = laggards(standings)
    if len(lagging) == len(standings) > 1:
        stuck_s = max(standing.silent_s for standing in standings)
        cause = f"hang, and none lags: no progress for {stuck_s:.0f} s; {places(standings)}"
        return Hang(rank=None, cause=cause, time=first)
    chosen = lagging[0]
    cause = f"hangs: no progress for {chosen.silent_s:.0f} s {chosen.text}"
    if lagging[1:]:
        cause += f" (as {ranks_text([standing.rank for standing in lagging[1:]])})"
    if world_size > 1:
        cause += "; the others wait for it"
    return Hang(rank=chosen.rank, cause=cause, time=first)


def laggards(standings: Sequence[Standing]) -> Sequence[Standing]:
    """Those of the fewest beats; of these, those that do not wait, and those that others of a group are ahead of.

    The surer of these two rules goes first. One that would leave nobody is passed over.
    """
    fewest = min(standing.beats for standing in standings)
    lagging: Sequence[Standing] = [standing for standing in standings if standing.beats == fewest]
    rules = [idle, behind] if all(standing.waits_in_call for standing in standings) else [behind, idle]
    for rule in rules:
        lagging = rule(lagging) or lagging
    return lagging


def idle(standings: Sequence[Standing]) -> Sequence[Standing]:
    return [standing for standing in standings if not standing.waits]


def behind(standings: Sequence[Standing]) -> Sequence[Standing]:
    """Those that have issued fewer collectives in some group than another of its ranks."""
    furthest: dict[str, int] = {}
    for name, count in chain.from_iterable(standing.collectives.items() for standing in standings):
        furthest[name] = max(count, furthest.get(name, 0))
    return [one for one in standings if any(count < furthest[name] for name, count in one.collectives.items())]


def places(standings: Sequence[Standing]) -> str:
    """Where the ranks stand, those of one place together."""
    ranks: dict[str, list[int]] = {}
    for standing in standings:
        ranks.setdefault(standing.text, []).append(standing.rank)
    shown = [f"{ranks_text(those)} {text}" for text, those in list(ranks.items())[:SHOWN_PLACES]]
    return "; ".join([*shown, *(["..."] if len(ranks) > SHOWN_PLACES else [])])


def ranks_text(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{' and more' if len(ranks) > 8 else ''}"
