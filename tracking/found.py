"""What really ran, as a record tells it: optimizers, formats, parameters and batches of the live objects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self, final

from pydantic import BaseModel, ConfigDict, Field

Runs = list[tuple[int, int]]  # steps in a row that took so many samples: (samples, steps)


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


@final
class Group(_Schema):
    """One param group of an optimizer, right before its first step."""

    parameters: int = Field(description="elements of the whole model that it steps")
    settings: dict[str, Any] = Field(description="lr, weight_decay, betas and whatever else is no tensor")


@final
class Stepping(_Schema):
    """An optimizer that steps the model; of one inside of an engine's, the inner one."""

    name: str = Field(description="its class")
    made_with: dict[str, Any] = Field(description="settings of groups that say nothing else, before any schedule")
    groups: list[Group]
    state: list[str] = Field(description="formats of what it keeps for each element")


@final
class Samples(_Schema):
    """How many samples were eaten, and of what shape."""

    micro: dict[int, int] = Field(description="by the samples of a micro-batch, how many there were on a data rank")
    step: dict[int, int] = Field(description="by the samples of an optimizer step over all data ranks, how many steps")
    shapes: list[list[int]] = Field(description="of one sample's tensors")


@final
class Found(_Schema):
    """What was read back from the live objects, and where it contradicts the config."""

    optimizers: list[Stepping]
    asked: bool | None = Field(
        description="whether the module made its optimizer by the config's; None where it was given none"
    )
    parameters: dict[str, int] = Field(description="elements of all parameters by format, most first")
    masters: list[str] = Field(description="formats that are stepped")
    gradients: list[str]
    trainable: int
    frozen: int
    buffers: int
    samples: Samples
    notes: list[str] = Field(description="contradictions, as they were told at the start")

    @property
    def parameter(self) -> str:
        """The formats of parameters, in words."""
        return " and ".join(self.parameters)

    @property
    def micro_batch(self) -> int | None:
        """Samples of most micro-batches; None of a run that took no step."""
        return most_common(self.samples.micro)

    @property
    def global_batch(self) -> int | None:
        return most_common(self.samples.step)


def most_common(counts: dict[int, int]) -> int | None:
    return max(counts, key=lambda samples: (counts[samples], samples)) if counts else None


class Tensors(NamedTuple):
    """Parameters or buffers that are known by one name."""

    elements: int
    trainable: bool
    format: str
    stepped: str  # format of what is stepped in its place
    group: tuple[int, int] | None  # which optimizer's, and which of its groups


@final
class RankFound(_Schema):
    """One rank's part of what is found."""

    data_rank: int
    parameters: dict[str, Tensors]  # by FQN
    buffers: dict[str, int]
    optimizers: list[Stepping]  # without numbers of parameters
    gradients: list[str]
    micro: dict[int, int]
    steps: Runs
    shapes: list[list[int]]

    @classmethod
    def load_all(cls, folder: Path, world_size: int) -> list[Self]:
        return [cls.model_validate_json(found_path(folder, rank).read_text()) for rank in range(world_size)]


def found_path(run_dir: Path, rank: int) -> Path:
    """Where a rank leaves its part for the first to read."""
    return run_dir / "ranks" / f"{rank}.found.json"


def merged(ranks: Sequence[RankFound], *, asked: bool | None, notes: Sequence[str]) -> Found:
    """What all ranks found: each parameter counts once, and each data rank's samples."""
    tensors: dict[str, Tensors] = {}
    for rank in ranks:
        tensors |= rank.parameters
    buffers: dict[str, int] = {}
    for rank in ranks:
        buffers |= rank.buffers
    formats = Counter[str]()
    for one in tensors.values():
        formats[one.format] += one.elements
    return Found(
        optimizers=[
            stepping(number, of_ranks, tensors.values())
            for number, of_ranks in enumerate(zip(*(rank.optimizers for rank in ranks), strict=True))
        ],
        asked=asked,
        parameters=dict(formats.most_common()),
        masters=sorted({one.stepped for one in tensors.values() if one.trainable}),
        gradients=formats_of(rank.gradients for rank in ranks),
        trainable=sum(one.elements for one in tensors.values() if one.trainable),
        frozen=sum(one.elements for one in tensors.values() if not one.trainable),
        buffers=sum(buffers.values()),
        samples=samples_of(ranks),
        notes=list(notes),
    )


def stepping(number: int, of_ranks: Sequence[Stepping], tensors: Iterable[Tensors]) -> Stepping:
    elements = Counter[tuple[int, int]]()
    for one in tensors:
        if one.group is not None:
            elements[one.group] += one.elements
    first = of_ranks[0]
    return first.model_copy(
        update={
            "groups": [
                group.model_copy(update={"parameters": elements[number, place]})
                for place, group in enumerate(first.groups)
            ],
            "state": formats_of(one.state for one in of_ranks),
        }
    )


def formats_of(lists: Iterable[Iterable[str]]) -> list[str]:
    return sorted(set(chain.from_iterable(lists)))


def samples_of(ranks: Sequence[RankFound]) -> Samples:
    """Ranks that stand beside each other on other axes than `data` see the same samples: one of them counts."""
    by_data_rank = {rank.data_rank: rank for rank in ranks}
    totals = Counter[int]()
    for samples, count in added([rank.steps for rank in by_data_rank.values()]):
        totals[samples] += count
    first = ranks[0]
    return Samples(micro=first.micro, step=dict(totals), shapes=first.shapes)


def added(runs: Sequence[Runs]) -> Iterator[tuple[int, int]]:
    """The sums, step by step, of what several ranks took, again as steps in a row."""
    left = [list(reversed(own)) for own in runs]
    while all(left):
        count = min(own[-1][1] for own in left)
        yield sum(own[-1][0] for own in left), count
        for own in left:
            samples, steps = own.pop()
            if steps > count:
                own.append((samples, steps - count))


def took(runs: Runs, samples: int) -> None:
    """One more step took so many samples."""
    if runs and runs[-1][0] == samples:
        runs[-1] = samples, runs[-1][1] + 1
    else:
        runs.append((samples, 1))


def alike(ours: object, theirs: object) -> bool:
    """Whether two settings of an optimizer are the same, such as [0.9, 0.95] and (0.9, 0.95)."""
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return ours == theirs
