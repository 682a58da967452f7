"""The grid's cases: every preset, every schedule, 2, 4 and 8 ranks, each switch both ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.agreement.cases import Case


@dataclass(frozen=True, kw_only=True)
class GridCase(Case):
    """A case whose nets have layers, heads and a batch enough for 8 ranks and 8 stages."""

    schedule: str = "1f1b"
    global_batch: int = 32

    @property
    def net(self) -> list[str]:
        heads = {"gpt": ["model.net.num_heads=8", "model.net.num_kv_heads=4"], "vit": ["model.net.num_heads=4"]}
        layers = 6 if self.world_size // self.others_than_pipe > 2 else 3  # two stages on each of 4 or 2 pipe ranks
        return [*super().net, f"model.net.num_layers={layers}", *heads[self.model]]

    @property
    def micro_batches(self) -> int:
        """As many as the schedule takes, of at most as many samples as there are."""
        pipe_ranks = self.world_size // self.others_than_pipe
        wanted = 2 * pipe_ranks if self.schedule == "dualpipev" else 4 if self.accumulation == 1 else pipe_ranks
        return 1 if self.strategy == "model_parallel" else min(wanted, self.micro_batch_size)

    @property
    def others_than_pipe(self) -> int:
        """Product of the mesh's other axes."""
        of_all = {"pipeline": 1, "model_parallel": 1, "2d_pipeline": self.world_size // 2, "3d": self.world_size // 2}
        return of_all.get(self.strategy, self.world_size)

    @property
    def extras(self) -> list[str]:
        if self.strategy not in ("pipeline", "2d_pipeline", "3d"):
            return super().extras
        return [
            f"strategy.schedule={self.schedule}",
            f"strategy.micro_batches={self.micro_batches}",
            *super().extras,
        ]


REPLICATE = ("strategy.shard_ranks=1",)
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")


def spreads() -> Iterator[dict[str, Any]]:
    """Every way to lay ranks out."""
    for strategy, world_sizes in {
        "fsdp": (2, 4, 8),
        "hsdp": (4, 8),
        "tensor": (2, 4),
        "model_parallel": (2, 4),
    }.items():
        yield from ({"strategy": strategy, "world_size": world_size} for world_size in world_sizes)
    yield {"strategy": "fsdp", "world_size": 2, "words": ("strategy.reshard_after_forward=false",)}
    yield {"strategy": "fsdp", "world_size": 4, "words": ("strategy.cpu_offload=true",)}
    yield {"strategy": "fsdp", "world_size": 4, "words": REPLICATE}
    yield {"strategy": "tensor", "world_size": 2, "words": ("strategy.sequence_parallel=false",)}
    yield {"strategy": "tensor", "world_size": 4, "words": ("strategy.loss_parallel=false",)}
    yield from ({"strategy": "2d", "world_size": world_size} for world_size in (4, 8))
    yield {"strategy": "2d", "world_size": 4, "words": REPLICATE}
    for schedule in SCHEDULES:
        yield {"strategy": "pipeline", "world_size": 2, "schedule": schedule}
        yield {"strategy": "pipeline", "world_size": 4, "schedule": schedule}
        yield {"strategy": "2d_pipeline", "world_size": 4, "schedule": schedule}
    # A schedule knows nothing of the tensor axis; of each kind there is one: plain, two stages on a rank, V-shaped.
    for schedule in ("1f1b", "interleaved_zero_bubble", "zbv"):
        yield {"strategy": "3d", "world_size": 8, "schedule": schedule}
    yield {"strategy": "2d_pipeline", "world_size": 8}
    yield {"strategy": "2d_pipeline", "world_size": 8, "words": ("strategy.shard_ranks=2",)}
    yield {"strategy": "2d_pipeline", "world_size": 4, "schedule": "zbv", "words": REPLICATE}
    yield {"strategy": "2d_pipeline", "world_size": 4, "words": ("strategy.reshard_after_forward=true",)}
    yield {"strategy": "3d", "world_size": 8, "words": REPLICATE}


# Each switch, one way and the other.
SWITCHES: dict[str, tuple[Any, Any]] = {
    "model": ("gpt", "vit"),
    "tied": (False, True),
    "optimizer": ("adamw", "sgd"),
    "clip": (True, False),
    "accumulation": (1, 2),
    "checkpointing": ("none", "full"),
}


def candidates() -> list[list[GridCase]]:
    """For every spread on less than 8 ranks two cases that set each switch in opposite ways, one of which is enough.

    Spreads on 8 ranks take as long as all others: each is one case, and over those alone, too, every pair of values of
    two switches occurs.
    """
    found, large = [], 0
    for number, spread in enumerate(spreads()):
        if spread["world_size"] == 8:
            # Whoever is left when all pairs have been is tied, which a ViT among those was not.
            pattern = PAIRS_IN_EIGHT[large % 8]
            found.append([case_of(spread, pattern if large < 8 else TIED_GPT | pattern & ~1)])
            large += 1
            continue
        # Multiples of an odd constant walk through all patterns of bits.
        found.append([case_of(spread, number * 37 % 64 ^ flipped) for flipped in (0, 63)])
    return found


def met_by(case: GridCase) -> set[tuple[str, str, Any]]:
    """What a case shows: its strategy, and its schedule, with a way that a switch stands."""
    return {(what, switch, getattr(case, switch)) for what in (case.strategy, case.schedule) for switch in SWITCHES}


TIED_GPT = 0b10
# An orthogonal array of strength 2 (Hedayat, Sloane and Stufken, Orthogonal Arrays, 1999): a bit of the column's number
# and of the row's, in common an odd number of times or not.
PAIRS_IN_EIGHT = [
    sum(((row & column).bit_count() & 1) << bit for bit, column in enumerate((1, 2, 4, 3, 5, 6))) for row in range(8)
]


def case_of(spread: dict[str, Any], pattern: int) -> GridCase:
    """The case of a spread whose switches stand as the bits of `pattern` say."""
    ways = [pattern >> bit & 1 for bit in range(len(SWITCHES))]
    chosen = {switch: values[way] for way, (switch, values) in zip(ways, SWITCHES.items(), strict=True)}
    case = GridCase(**{**chosen, **spread})
    return replace(case, tied=case.tied and case.model == "gpt")


# One of the two cases of every preset, every schedule, and 8 ranks once.
CHOSEN_SPREADS: list[dict[str, Any]] = [
    {"strategy": "fsdp", "world_size": 2, "words": ()},
    {"strategy": "fsdp", "world_size": 4, "words": REPLICATE},
    {"strategy": "hsdp", "world_size": 4},
    {"strategy": "tensor", "world_size": 2, "words": ()},
    {"strategy": "tensor", "world_size": 4, "words": ()},
    {"strategy": "model_parallel", "world_size": 2},
    {"strategy": "2d", "world_size": 4, "words": ()},
    {"strategy": "2d", "world_size": 4, "words": REPLICATE},
    {"strategy": "pipeline", "world_size": 2, "schedule": "gpipe"},
    {"strategy": "pipeline", "world_size": 4, "schedule": "1f1b"},
    {"strategy": "pipeline", "world_size": 2, "schedule": "interleaved_1f1b"},
    {"strategy": "pipeline", "world_size": 2, "schedule": "looped_bfs"},
    {"strategy": "2d_pipeline", "world_size": 4, "schedule": "interleaved_zero_bubble"},
    {"strategy": "2d_pipeline", "world_size": 4, "schedule": "zbv", "words": ()},
    {"strategy": "pipeline", "world_size": 4, "schedule": "dualpipev"},
    {"strategy": "3d", "world_size": 8, "schedule": "1f1b", "words": ()},
]
CHOSEN = [
    cases[number % len(cases)]
    for number, spread in enumerate(CHOSEN_SPREADS)
    for cases in [next(cases for cases in candidates() if vars(cases[0]).items() >= spread.items())]
]


def matrix() -> list[GridCase]:
    """A case of every spread, the chosen ones among them, and others until no further one would show anything new."""
    cases = list(CHOSEN)

    def news(case: GridCase) -> int:
        return len(met_by(case) - set().union(*map(met_by, cases)))

    for spread in candidates():
        if not any(case in cases for case in spread):
            cases.append(max(spread, key=news))
    others = [case for spread in candidates() for case in spread]
    while news(most := max(others, key=news)):
        cases.append(most)
    return cases


MATRIX = matrix()

# What stands for each preset in the everyday tests, on as few ranks as it takes.
EVERYDAY_SPREAD: dict[str, dict[str, Any]] = {
    "fsdp": {"world_size": 2},
    "hsdp": {"world_size": 4},
    "tensor": {"world_size": 2},
    "model_parallel": {"world_size": 2},
    "2d": {"world_size": 4},
    "pipeline": {"world_size": 2, "schedule": "looped_bfs"},  # tied, and two stages on each rank
    "2d_pipeline": {"world_size": 4, "schedule": "zbv"},
    "3d": {"world_size": 8},
}
EVERYDAY = [
    next(case for case in CHOSEN if vars(case).items() >= {"strategy": strategy, **spread}.items())
    for strategy, spread in EVERYDAY_SPREAD.items()
]
