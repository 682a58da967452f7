"""Where what ran is not what the config says, in one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.utils import get_object

from tracking.found import Found, Stepping, alike

# Numbers of the config's optimizer that are looked for in the one that steps.
NUMBERS = ("lr", "weight_decay", "momentum", "betas", "eps")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the config says of a run."""

    optimizer: Mapping[str, Any]  # the section
    optimizer_choice: str | None
    precision: str
    parameter: str  # format
    micro_batch: int
    global_batch: int


def contradictions(found: Found, expected: Expected, module: str) -> list[str]:
    """One line for each, in which `module` is the class that is trained."""
    return [
        *optimizer_contradictions(found, expected, module),
        *format_contradictions(found, expected, module),
        *batch_contradictions(found, expected),
    ]


def optimizer_contradictions(found: Found, expected: Expected, module: str) -> Iterator[str]:
    section = expected.optimizer
    for optimizer in found.optimizers[:1]:
        other = differing(optimizer, section)
        is_other = not is_kind(optimizer, str(section.get("_target_")))
        if not other and not is_other:
            continue
        kind = optimizer.name.rpartition(".")[2]
        shown = other or [key for key in NUMBERS[:1] if key in section]
        ours = " ".join(f"optimizer.{key}={section[key]}" for key in shown)
        live = ", ".join(f"{key}={optimizer.made_with[key]}" for key in NUMBERS if key in optimizer.made_with)
        if found.asked:
            yield f"{ours} is not what runs: {module}.configure_optimizers makes {kind} with {live}."
        else:
            yield (
                f"optimizer={expected.optimizer_choice} {ours} is not used: {module}.configure_optimizers makes its "
                f"own {kind} with {live}; to change that, give the model a key optimizer: ${{optimizer}} and call it "
                f"with the parameters."
            )


def differing(optimizer: Stepping, section: Mapping[str, Any]) -> list[str]:
    """Keys of the config's numbers that the optimizer was not made with."""
    made = optimizer.made_with
    return [key for key in NUMBERS if key in section and not (key in made and alike(section[key], made[key]))]


def is_kind(optimizer: Stepping, target: str) -> bool:
    """Whether an optimizer is of the class that `_target_` names; True where that names something else, a function."""
    kind = get_object(target)
    return not isinstance(kind, type) or optimizer.name == f"{kind.__module__}.{kind.__qualname__}"


def format_contradictions(found: Found, expected: Expected, module: str) -> Iterator[str]:
    floats = {key: count for key, count in found.parameters.items() if "float" in key}
    others = {key: count for key, count in floats.items() if key != expected.parameter}
    if others:
        counts = " and ".join(f"{count:,} in {key}" for key, count in others.items())
        yield (
            f"precision={expected.precision} has parameters in {expected.parameter}, but of {module}'s "
            f"{sum(floats.values()):,} elements are {counts}, as its own code or its file has them; convert them "
            f"there (.to(torch.{expected.parameter})), or choose the precision that is meant."
        )


def batch_contradictions(found: Found, expected: Expected) -> Iterator[str]:
    micro, whole = set(found.samples.micro), set(found.samples.step)
    if micro - {expected.micro_batch}:
        sizes = " and ".join(map(str, sorted(micro)))
        yield (
            f"data.micro_batch_size={expected.micro_batch}, but the loader gives micro-batches of {sizes} samples; "
            f"have both say the same."
        )
    elif whole - {expected.global_batch}:
        sizes = " and ".join(map(str, sorted(whole)))
        yield f"data.global_batch_size={expected.global_batch}, but steps took {sizes} samples."
