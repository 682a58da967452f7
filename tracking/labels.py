"""What runs are called side by side: repeats by one name, and others by what tells them apart."""

from collections import defaultdict
from collections.abc import Sequence

from tracking.comparability import config_differences, repeat_key
from tracking.sources import Run


def groups_of(runs: Sequence[Run]) -> list[list[int]]:
    """Repeats together, in the order of the first; a run without a record stands alone."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        groups[str(index) if run.record is None else repeat_key(run.record)].append(index)
    return list(groups.values())


def labels_of(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[str]:
    """Names; where two are the same, with the number of devices, then with what differs in the config."""
    firsts = [runs[group[0]] for group in groups]
    labels = [run.name for run in firsts]
    for tell in (_sizes, _entries, _places, _numbers):
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            same = [place for place, own in enumerate(labels) if own == label]
            told = tell([firsts[place] for place in same])
            if len(set(told)) > 1:
                for place, extra in zip(same, told, strict=True):
                    labels[place] = f"{label} {extra}".strip()
    return labels


def members_of(label: str, runs: Sequence[Run]) -> list[str]:
    """Labels of the repeats that `label` stands for: their seeds, or numbers where two have the same."""
    if len(runs) == 1:
        return [label]
    seeds = [seed_of(run) for run in runs]
    if len(set(seeds)) == len(runs):
        return [f"{label}, seed {seed}" for seed in seeds]
    return [f"{label}, repeat {number}" for number in range(1, len(runs) + 1)]


def _sizes(runs: Sequence[Run]) -> list[str]:
    return [f"x {run.record.world_size}" if run.record else "" for run in runs]


def _entries(runs: Sequence[Run]) -> list[str]:
    """For each run as many of the config's entries as tell `runs` apart, at most two; classes say less than values."""
    names = [str(number) for number in range(len(runs))]
    differences = config_differences(runs, names, [[number] for number in range(len(runs))])
    said: list[str] = [""] * len(runs)
    for difference in sorted(differences, key=lambda one: one.key.endswith("_target_"))[:2]:
        for value, holders in difference.values.items():
            for name in holders:
                entry = f"{difference.key.rpartition('.')[2]}={value}"
                said[int(name)] = f"{said[int(name)]}, {entry}".removeprefix(", ")
        if len(set(said)) == len(runs):
            break
    return said


def _places(runs: Sequence[Run]) -> list[str]:
    return [f"in {run.folder.name}" if run.folder else "" for run in runs]


def _numbers(runs: Sequence[Run]) -> list[str]:
    return [f"#{number}" for number in range(1, len(runs) + 1)]


def seed_of(run: Run) -> int | None:
    return None if run.record is None else run.record.seed
