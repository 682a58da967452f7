"""ParallelPlan: the one thing a net tells strategies about itself, as pure data (no torch here)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from models.refused import RefusedError

# What a value of `ParallelPlan.tensor` means. A module that no glob matches is whole on every rank.
TENSOR_STYLES: Mapping[str, str] = {
    "colwise": "Linear split along its outputs: takes whole inputs, gives split outputs",
    "rowwise": "Linear split along its inputs: takes split inputs, outputs are summed over the ranks; bias whole",
    "embedding": "Embedding split along the vocabulary: outputs are summed over the ranks",
    "vocabulary": "Linear to logits split along the vocabulary: logits stay split, the loss is taken over the shards",
    "sequence": "parameters whole on every rank, activations may be split along dim 1, the sequence (norms)",
    "whole": "parameters and activations whole on every rank; like sequence, for what feeds modules that are split",
}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A plan's FQNs with every glob expanded, in forward order."""

    stem: tuple[str, ...]
    blocks: tuple[str, ...]
    head: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """All of them, first to last."""
        return self.stem + self.blocks + self.head


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Where a net may be cut and split.

    `net` is the attribute of the LightningModule that `training_step` calls exactly once; every other FQN is relative
    to it. An FQN may be a glob whose `*` stands for one name between dots: `blocks.*` is `blocks.0`, not
    `blocks.0.mlp`.

    `stem`, `blocks` and `head` list modules in forward order, and chaining them is the net's forward: the positional
    arguments of the call go to the first module of the stem, each output is the next module's one input, and the
    keyword arguments of the call go to the last module of the head, so that a head may compute the loss itself.

    `tensor` maps FQN globs of modules to a name in TENSOR_STYLES; `splits` has the sizes that it divides, by the config
    keys that set them (`model.net.num_heads`). `tied` pairs the FQNs of a parameter that is one object in two places;
    the first is its owner.

    `keep_dtype` has FQN globs of buffers that stay in their own format where the weights are in 16 bits: a table of
    angles, say, of which bfloat16 would leave 3 digits.
    """

    net: str = "net"
    stem: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    tensor: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    keep_dtype: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern, style in self.tensor.items():
            if style not in TENSOR_STYLES:
                raise RefusedError(
                    f"plan.tensor[{pattern!r}]={style!r} is no style; choose from {', '.join(TENSOR_STYLES)}."
                )

    def style(self, name: str) -> str | None:
        """The tensor style of the module called `name`, None where no glob matches it."""
        return next((style for pattern, style in self.tensor.items() if matches(pattern, name)), None)

    def expand(self, module_names: Iterable[str]) -> Chain:
        """Find the plan's modules among the names of `net.named_modules()`.

        Globs expand in natural order: `blocks.2` before `blocks.10`. ValueError when an entry matches nothing.
        """
        names = sorted(set(module_names), key=_natural)
        return Chain(**{part: _expand(part, getattr(self, part), names) for part in ("stem", "blocks", "head")})

    def require(self, parts: Iterable[str], model: str) -> None:
        """Refuse a `model` (its name, for the message) whose plan lacks one of `parts`, with a ValueError."""
        for part in parts:
            if not getattr(self, part):
                raise RefusedError(
                    f"model={model} has no plan.{part}, which this strategy needs; "
                    f"give its ParallelPlan a `{part}`, or choose another strategy."
                )


def matches(pattern: str, name: str) -> bool:
    """Whether the FQN glob `pattern` matches the FQN `name`; `*` never crosses a dot."""
    globs, parts = pattern.split("."), name.split(".")
    return len(globs) == len(parts) and all(map(fnmatchcase, parts, globs))


def _expand(part: str, patterns: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    found: list[str] = []
    for pattern in patterns:
        matched = [name for name in names if matches(pattern, name)]
        if not matched:
            raise RefusedError(f"plan.{part}: {pattern!r} matches no module of the net; correct the FQN or the glob.")
        found += matched
    return tuple(found)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which numbers inside names compare as numbers."""
    return [(int(token), "") if token.isdigit() else (-1, token) for token in re.findall(r"\d+|\D+", name)]
