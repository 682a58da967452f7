"""The typed config: every key of a run with its type, range and the rules between keys. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from launch.callbacks import leaves_steps_alone
from launch.keys import did_you_mean
from models.refused import RefusedError
from strategies.fitting import Fitting
from strategies.spec import Precision
from tracking.wandb_config import WandbConfig

# Keys that may differ between two runs that train the same thing: how a run is watched, where it lies.
NOT_IDENTITY = (
    "name", "run_dir", "resume", "resume_despite", "evidence", "evidence_step", "logger", "launcher", "checkpoint",
    "status", "expect", "choices", "hparams", "objective", "profile", "debug", "callbacks",
)  # fmt: skip


AUTO = "auto"  # of `resume`: from the newest good checkpoint of the run's own folder, if it has one

# Numbers of torch's optimizers and of our schedules: least value, bound that is not reached, whether it is a count.
RANGES: dict[str, tuple[float, float, bool]] = {
    "lr": (0, math.inf, False),
    "eps": (0, math.inf, False),
    "weight_decay": (0, math.inf, False),
    "momentum": (0, 1, False),
    "final_fraction": (0, math.inf, False),
    "warmup_steps": (0, math.inf, True),
    "max_steps": (1, math.inf, True),
}


# What is meant by a number that is not allowed.
ADVICE = {
    "trainer.clip_norm": "no gradient would be left; give a number greater than 0, or null to clip none.",
    "trainer.val_every_steps": "give a number greater than 0, or null to validate at the end alone.",
    "checkpoint.every_steps": "give a number greater than 0, or null to save none on the way.",
    "checkpoint.every_minutes": "give a number greater than 0, or null to save none on the way.",
}


class ConfigError(RefusedError):
    """A mistake in what the user asked for: one line that names key, value and fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainerConfig(Section):
    max_steps: PositiveInt  # optimizer steps
    clip_norm: PositiveFloat | None
    val_every_steps: PositiveInt | None
    log_every_steps: PositiveInt
    trace_steps: NonNegativeInt = 0  # how many optimizer steps are traced behind the warm-up
    sync_batchnorm: bool = False  # whether BatchNorm's statistics are those of all data ranks' samples
    on_nan: Literal["stop", "skip"]  # what becomes of an optimizer step whose loss or gradient is no number


class LauncherConfig(Section):
    name: Literal["local"]
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt | Literal["auto"]
    threads_per_rank: PositiveInt | Literal["auto"]
    startup_timeout_s: float = Field(1800, gt=0, le=7 * 24 * 3600)  # configs of older runs have none
    timeout_s: float = Field(gt=0, le=7 * 24 * 3600)


class CheckpointConfig(Section):
    every_steps: PositiveInt | None
    every_minutes: PositiveFloat | None
    at_end: bool | Literal["auto"]
    keep_last: PositiveInt
    keep_best: NonNegativeInt
    asynchronous: bool

    @property
    def asked(self) -> bool:
        """Whether the user relies on checkpoints, so that one who cannot have any must hear of it."""
        return bool(self.every_steps or self.every_minutes or self.keep_best or self.at_end is True)


class HparamsConfig(Section):
    trials: PositiveInt
    sampler: Literal["tpe", "random"]
    params: dict[str, str]  # key: a sweep as the command line takes it


class ObjectiveConfig(Section):
    name: Literal["val_loss", "time_to_loss", "step_ms"]
    loss: float | None = Field(allow_inf_nan=False)  # that is to be reached


class ProfileConfig(Section):
    name: Literal["torch", "memory"]
    first_step: PositiveInt
    steps: PositiveInt
    shapes: bool = False  # these three of torch alone
    stacks: bool = False
    memory: bool = False

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps - 1

    @property
    def disturbed(self) -> range:
        """The optimizer steps whose times say nothing of the run: torch's profiler warms up in one more."""
        return range(self.first_step - (self.name == "torch"), self.last_step + 1)


class DebugConfig(Section):
    name: Literal["nan", "flight_recorder"]
    entries: PositiveInt = 2000  # collectives that a rank's flight recorder keeps


WEIGHTS = ("weights", "weights_rename", "weights_ignore", "weights_may_lack")


def of_model(key: str) -> AliasChoices:
    """A key that the user finds among the model's, which is none of the LightningModule's constructor."""
    return AliasChoices(AliasPath("model", key), key)


class RunConfig(Section):
    """One run. Sections with a `_target_` are built by `build_spec` (strategy, data) or by the worker (model)."""

    seed: int = Field(ge=0, lt=2**32)  # what torch and numpy both take
    name: str = Field(min_length=1)
    run_dir: str = Field(min_length=1)
    resume: str | None  # a checkpoint, a run folder that has one, or AUTO
    resume_despite: list[str]  # keys that may differ from the run that wrote the checkpoint
    evidence: bool | Literal["plain"]  # "plain": of plain Lightning, which certificates compare with
    evidence_step: NonNegativeInt | None = None  # of which every module's values and gradients are written down
    compile: bool
    trainer: TrainerConfig
    strategy: dict[str, Any]
    model: dict[str, Any]
    # What the model starts from.
    weights: str | None = Field(None, validation_alias=of_model("weights"))
    weights_rename: list[str] = Field([], validation_alias=of_model("weights_rename"))
    weights_ignore: list[str] = Field([], validation_alias=of_model("weights_ignore"))
    weights_may_lack: list[str] = Field([], validation_alias=of_model("weights_may_lack"))
    data: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    precision: Precision
    logger: WandbConfig
    launcher: LauncherConfig
    checkpoint: CheckpointConfig
    hparams: HparamsConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig(name="val_loss", loss=None)
    profile: ProfileConfig | None = None
    debug: DebugConfig | None = None
    callbacks: dict[str, dict[str, Any]] = {}  # by their names, sections with a `_target_` that the worker builds
    status: Literal["untested", "measured"] | None  # of a recipe
    expect: dict[str, float | str] | None  # of a measured recipe: what was seen, on what hardware, with what versions
    data_digest: str | None = None  # of the files that are trained on; written by launch.dispatch
    choices: dict[str, str | None]  # which file of each group was chosen; written by launch.compose

    @field_validator("model")
    @classmethod
    def weights_are_apart(cls, section: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in section.items() if key not in WEIGHTS}

    @property
    def fitting(self) -> Fitting:
        """How `model.weights` are made to fit."""
        return Fitting(self.weights_rename, self.weights_ignore, self.weights_may_lack)

    @field_validator("model", "optimizer")
    @classmethod
    def counts_are_positive(cls, section: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Sizes of a net are checked by their names, since its class cannot be imported without torch."""
        for key, value in leaves(section, f"{info.field_name}."):
            last = key.rpartition(".")[2]
            is_count = last.startswith("num_") or last.endswith("_size")
            if is_count and value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}: must be a whole number above 0 (got {value!r}).")
        return section

    @field_validator("optimizer", "scheduler")
    @classmethod
    def rates_are_in_range(cls, section: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Numbers of torch's optimizers and our schedules, by their names: their classes need torch too."""
        betas = section.get("betas")
        if betas is not None and not are_betas(betas):
            raise ValueError(f"{info.field_name}.betas: must be two numbers in [0, 1), as [0.9, 0.95] (got {betas!r}).")
        for key, value in section.items():
            if key in RANGES and value is not None and not in_range(key, value):
                low, high, counts = RANGES[key]
                kind = "whole number" if counts else "number"
                raise ValueError(f"{info.field_name}.{key}: must be a {kind} in [{low:g}, {high:g}) (got {value!r}).")
        return section

    @field_validator("callbacks", mode="before")
    @classmethod
    def callbacks_have_targets(cls, sections: Any) -> Any:
        """One that is null is none: so one of several can be taken back."""
        if not isinstance(sections, Mapping):
            return {} if sections is None else sections
        kept = {key: section for key, section in sections.items() if section is not None}
        for key, section in kept.items():
            if not isinstance(section, Mapping) or not isinstance(section.get("_target_"), str):
                raise ValueError(f"callbacks.{key}: a callback needs callbacks.{key}._target_=package.YourCallback.")
        return kept

    @property
    def hash(self) -> str:
        """Twelve hex digits that are equal for two runs that train the same thing the same way."""
        identity = {key: value for key, value in self.model_dump().items() if key not in NOT_IDENTITY}
        active = {key: section for key, section in self.callbacks.items() if not leaves_steps_alone(section)}
        if active:
            identity["callbacks"] = active
        return sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def in_range(key: str, value: object) -> bool:
    """Whether `value` is what RANGES says of `key`."""
    low, high, counts = RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int if counts else int | float):
        return False
    return low <= value < high


def are_betas(value: object) -> bool:
    """Whether it is what Adam and its kin decay by: some have a third."""
    numbers = list(value) if isinstance(value, list | tuple) else []
    return len(numbers) in (2, 3) and all(in_range("momentum", number) for number in numbers)


def leaves(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        if isinstance(value, Mapping):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def validate(tree: dict[str, Any]) -> RunConfig:
    """The composed tree as a RunConfig; ConfigError in one line for the first key that is wrong."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(first_line(error)) from None


def key_of(entry: ErrorDetails) -> str:
    """Dotted key of one pydantic error; the names of a union's members, which pydantic adds, are left out."""
    members = ("constrained-", "literal[", "list[", "str", "int", "float")
    return ".".join(str(part) for part in entry["loc"] if not str(part).startswith(members))


def first_line(error: ValidationError, prefix: str = "") -> str:
    """`trainer.max_steps: Input should be greater than 0 (got -3).` for the first key that a ValidationError names."""
    first = error.errors()[0]
    key = ".".join(part for part in (prefix, key_of(first)) if part)
    match first["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{key}={first['input']}: there is no such key{did_you_mean(key)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{key} is missing; give it a value."
        case "value_error":
            return first["msg"].removeprefix("Value error, ")
    if key in ADVICE and first["type"] == "greater_than":
        return f"{key}={first['input']!r}: {ADVICE[key]}"
    wanted = dict.fromkeys(entry["msg"] for entry in error.errors() if key_of(entry) == key_of(first))
    return f"{key}: {' or '.join(wanted)} (got {first['input']!r})."


def build_spec(section: dict[str, Any], name: str, kind: type) -> Any:
    """The torch-free object that `section` describes; ConfigError if its `_target_`, keys or values are wrong."""
    try:
        spec = instantiate(section, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            raise ConfigError(first_line(cause, prefix=name)) from None
        raise ConfigError(f"{name}: {str(cause or error).splitlines()[0]}") from None
    if not isinstance(spec, kind):
        raise ConfigError(
            f"{name}._target_={section.get('_target_')} is not a {kind.__module__}.{kind.__name__}; "
            f"choose one of the files in conf/{name}/."
        )
    return spec
