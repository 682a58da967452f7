"""Which runs may be compared with which: repeats, differing configs, and what is to be doubted."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tracking.record import RunRecord
from tracking.sources import Run

# Where and how a run is kept, and what follows from other keys; `data.seed` follows from `seed`.
BOOKKEEPING = (
    "name", "run_dir", "logger", "choices", "status", "expect", "resume", "resume_despite", "evidence", "hparams",
    "objective",
)  # fmt: skip


CHECKPOINT = re.compile(r"step-(\d+)$")


class Doubt(BaseModel):
    """A fact in which the runs differ, and what a difference between them may come from because of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fact: str
    text: str


class Difference(BaseModel):
    """A key of the config, and by value which runs have it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    values: dict[str, list[str]]


# Facts that should be the same, and what is spoilt where they are not.
FACTS: tuple[tuple[str, Callable[[RunRecord], Any], str], ...] = (
    ("model", lambda record: record.model, "losses, times and memory are those of different models"),
    ("parameters", lambda record: record.model_stats.parameters, "models are of different size"),
    ("data", lambda record: record.data, "losses are of different samples"),
    ("content of the data", lambda record: record.config.get("data_digest"), "losses are of different samples"),
    ("tokens per sample", lambda record: record.batch.tokens_per_sample, "losses and times are of other samples"),
    ("start", lambda record: beginning(record), "losses and times leave out what another run has done"),
    ("optimizer steps", lambda record: record.results.steps, "final losses are of different moments"),
    ("global batch", lambda record: record.batch.global_, "a step is not the same step"),
    ("optimizer that ran", lambda record: optimizers_of(record), "a step is not the same step"),
    ("formats of parameters", lambda record: record.found and record.found.parameter, "losses round otherwise"),
    ("precision", lambda record: record.precision.name, "losses round, and times and memory count, other formats"),
    ("device", lambda record: record.environment.device, "times are of different hardware"),
    ("cores", lambda record: record.environment.cores, "times are of different hardware"),
    ("Python", lambda record: record.environment.python, "times may come from the version"),
    ("torch", lambda record: record.environment.torch, "times and rounding may come from the version"),
    ("lightning", lambda record: record.environment.lightning, "times may come from the version"),
    ("source of model and data", lambda record: record.environment.source, "the code may have changed in between"),
    ("revision of Concord", lambda record: record.environment.revision, "the code may have changed in between"),
)


def optimizers_of(record: RunRecord) -> str | None:
    """The classes of those that stepped; None of a record of before that was looked at."""
    return None if record.found is None else ", ".join(one.name for one in record.found.optimizers)


def beginning(record: RunRecord) -> int | str:
    """The optimizer step at which the run began: behind those of another run's checkpoint, if it went on from one."""
    resume = record.config.get("resume")
    if not resume or Path(resume).is_relative_to(str(record.config.get("run_dir"))):
        return 0
    step = CHECKPOINT.search(str(resume))
    return int(step[1]) if step else str(resume)


def repeat_key(record: RunRecord) -> str:
    """The same for runs that differ by their seed alone."""
    config = {key: value for key, value in record.config.items() if key not in (*BOOKKEEPING, "seed")}
    if isinstance(config.get("data"), Mapping):
        config["data"] = {key: value for key, value in config["data"].items() if key != "seed"}
    said = [record.strategy, record.world_size, *(value(record) for _, value, _ in FACTS)]
    return json.dumps([said, config], sort_keys=True, default=str)


def doubts(runs: Sequence[Run], labels: Sequence[str], groups: Sequence[Sequence[int]]) -> list[Doubt]:
    """Warnings, the gravest kinds first; `labels` are those of `groups` of repeats."""
    records = {
        label: record
        for label, group in zip(labels, groups, strict=True)
        if (record := runs[group[0]].record) is not None
    }
    found = [
        Doubt(fact=fact, text=f"{fact} differs: {listed(values)}; {spoilt}.")
        for fact, value, spoilt in FACTS
        if len(values := by_value({label: value(record) for label, record in records.items()})) > 1
    ]
    found += notes_of(records)
    # Repeats are compared seed by seed: one that all have is enough.
    seeds = {label: _seeds(runs, group) for label, group in zip(labels, groups, strict=True) if label in records}
    if seeds and not set.intersection(*seeds.values()):
        values = by_value({label: ", ".join(map(str, sorted(own))) for label, own in seeds.items()})
        text = f"seed differs: {listed(values)}; weights start elsewhere, and samples come in another order."
        found.append(Doubt(fact="seed", text=text))
    shared = {
        record.environment.cores
        for record in records.values()
        if record.results.memory_source == "resident set" and record.world_size > 1
    }
    if shared:
        cores = " or ".join(map(str, sorted(shared)))
        text = f"ranks are processes that share {cores} cores; their times say little of devices of their own."
        found.append(Doubt(fact="hardware", text=text))
    return found


def notes_of(records: Mapping[str, RunRecord]) -> list[Doubt]:
    """What records say of runs that were not what their configs say; what several say is told once."""
    holders: dict[str, list[str]] = {}
    for label, record in records.items():
        notes = [*(record.found.notes if record.found else []), *own_metrics(record)]
        for note in notes:
            holders.setdefault(note, []).append(label)
    return [Doubt(fact="config", text=f"{', '.join(labels)}: {note}") for note, labels in holders.items()]


def own_metrics(record: RunRecord) -> list[str]:
    names = ", ".join(record.results.val_of_one_rank)
    return [f"{names} is of the first rank's samples alone; log it with sync_dist=True."] if names else []


def config_differences(runs: Sequence[Run], labels: Sequence[str], groups: Sequence[Sequence[int]]) -> list[Difference]:
    """Keys of the config with more than one value; `labels` are those of `groups` of repeats.

    A key that a run does not have counts as a value, but not under `strategy`, whose kinds have keys of their own.
    """
    configs = {
        label: _flat({key: value for key, value in record.config.items() if key not in BOOKKEEPING})
        for label, group in zip(labels, groups, strict=True)
        if (record := runs[group[0]].record) is not None
    }
    found = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        held = {label: config.get(key, "not there") for label, config in configs.items()}
        if key.startswith("strategy."):
            held = {label: value for label, value in held.items() if key in configs[label]}
        values = by_value(held)
        if len(values) > 1 and values != {label: [label] for label in configs}:  # as the labels say already
            found.append(Difference(key=key, values=values))
    return [one for one in found if not any(_repeats(one, other) for other in found)]


def _repeats(one: Difference, other: Difference) -> bool:
    """Whether `one` is `other` again, such as model.optimizer.lr, which is optimizer.lr by reference."""
    return one.key.endswith(f".{other.key}") and one.values == other.values


def by_value(held: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which labels hold which value, in the order in which values appear."""
    values: dict[str, list[str]] = {}
    for label, value in held.items():
        values.setdefault("none" if value is None else str(value), []).append(label)
    return values


def listed(values: Mapping[str, Sequence[str]]) -> str:
    """`fp32 (single, ddp), bf16 (zero3)`; who holds what most hold is left to the rest."""
    most = max(values, key=lambda value: len(values[value]))
    many = len(values[most]) > 2
    parts = [
        f"{value} ({'all others' if many and value == most else ', '.join(holders)})"
        for value, holders in values.items()
    ]
    return ", ".join(parts)


def _seeds(runs: Sequence[Run], group: Sequence[int]) -> set[int]:
    return {record.seed for index in group if (record := runs[index].record) is not None}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
