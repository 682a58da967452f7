"""Callbacks that are not Concord's: made from the config, checked, and their state saved and put back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from launch.callbacks import ends_early, leaves_steps_alone, lightnings, refusal
from launch.job import Job
from launch.schema import ConfigError, RunConfig
from models.steps import steps_done
from strategies.checkpoint import Manifest
from strategies.engines.ema import EMA
from strategies.spec import Strategy

OURS = ("launch.", "tracking.", "strategies.")  # packages, in which no callback of a user's can lie
KEPT_ELEMENTS = 4096  # of a tensor in a callback's state, at most: it is written as text
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
}


def build_callbacks(config: RunConfig, strategy: Strategy) -> list[pl.Callback]:
    """The callbacks that the config describes and the run is to have; ConfigError in one line if one is wrong.

    Runs that are made to be compared are not ended early; plain Lightning has only what may change a step.
    """
    made = []
    for key, section in config.callbacks.items():
        if (config.evidence and ends_early(section)) or (config.evidence == "plain" and leaves_steps_alone(section)):
            continue
        try:
            callback = instantiate(section, _convert_="all")
        except InstantiationException as error:
            raise ConfigError(f"callbacks.{key}: {str(error.__cause__ or error).splitlines()[0]}") from None
        if not isinstance(callback, pl.Callback):
            raise ConfigError(
                f"callbacks.{key}._target_={section['_target_']} is not a lightning.pytorch.callbacks.Callback; give a "
                f"class that is."
            )
        check(callback, f"callbacks.{key}", strategy)
        made.append(callback)
    return made


def check(callback: pl.Callback, place: str, strategy: Strategy) -> None:
    """ConfigError if a callback, or a class that it comes from, does not go with the run."""
    own = type(callback).__name__
    for kind in type(callback).__mro__:
        name = lightnings(f"{kind.__module__}.{kind.__name__}")
        reason = name and refusal(name, strategy)
        if reason:
            raise ConfigError(f"{place}: {own if own == name else f'{own}, a {name},'} {reason}")


class Guests(pl.Callback):
    """Stands before all others, and looks after those that are not Concord's."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def meet(self, model: pl.LightningModule) -> None:
        """Have what the model's `configure_callbacks` gives checked, too, when Lightning asks for it."""
        configure: Callable[[], Any] = model.configure_callbacks

        def checked() -> Any:
            given = configure()
            for callback in given if isinstance(given, Sequence) else [given]:
                check(callback, f"{type(model).__name__}.configure_callbacks", self.job.strategy)
            return given

        model.configure_callbacks = checked  # type: ignore[method-assign]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning puts a model's callbacks behind ours, which are to see what all others do."""
        if trainer.is_global_zero:
            let_speak("lightning.pytorch.callbacks")
        them = guests_of(trainer)
        trainer.callbacks = [*them, *(one for one in callbacks_of(trainer) if one not in them)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.job.config.resume is None:
            return
        saved = Manifest.read(Path(self.job.config.resume)).callbacks
        for callback in guests_of(trainer):
            if callback.state_key in saved:
                callback.load_state_dict(revived(saved.pop(callback.state_key)))
        if saved and trainer.is_global_zero:
            print(f"resume: this run has no {', no '.join(sorted(saved))}; what the checkpoint has of it is dropped.")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = steps_done(trainer)
        if done >= trainer.max_steps or not trainer.is_global_zero:
            return
        told = (one.stopping_reason_message for one in guests_of(trainer) if isinstance(one, EarlyStopping))
        reason = next(filter(None, told), "trainer.should_stop was set.")
        print(f"Ended behind step {done} of {trainer.max_steps}: {reason}")

    def unkept(self, trainer: pl.Trainer) -> str | None:
        """What of a callback a run that goes on would not have again; None where there is nothing."""
        for callback in guests_of(trainer):
            kind = type(callback).__name__
            for hook in ("on_save_checkpoint", "on_load_checkpoint"):
                if is_overridden(hook, callback, pl.Callback):
                    return f"{kind}.{hook} is not called, since no rank has the whole state; keep it in its state_dict."
            try:
                plain(callback.state_dict())
            except TypeError as error:
                return f"{kind}.state_dict has {error}; keep numbers, text, lists, dicts and small tensors in it."
        return None

    def states(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What callbacks keep, as JSON knows it."""
        kept = {callback.state_key: callback.state_dict() for callback in guests_of(trainer)}
        try:
            return {key: plain(state) for key, state in kept.items() if state}
        except TypeError as error:
            raise ValueError(
                f"checkpoint: the state_dict of a callback has {error} by now, which cannot be kept."
            ) from None


class Printed(logging.Handler):
    """What Lightning's callbacks log, a summary say, as a run prints it: above its bar, and into the rank's log."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage())


def let_speak(package: str) -> None:
    """Lightning's own words are left out of a run, but those of callbacks were asked for."""
    logger = logging.getLogger(package)
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [Printed()], False


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def guests_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Those that were asked for."""
    return [one for one in callbacks_of(trainer) if type(one) is EMA or not type(one).__module__.startswith(OURS)]


def plain(value: Any) -> Any:
    """A value such that JSON knows it, and `revived` gives it back; TypeError for what cannot be kept so."""
    if type(value) in (bool, int, float, str, type(None)):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if type(value) is list:
        return [plain(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None
    if dtype not in DTYPES or value.numel() > KEPT_ELEMENTS:
        raise TypeError(f"a {type(value).__name__}" + (f" of {value.numel()} {dtype}" if dtype else ""))
    return {"tensor": value.detach().cpu().tolist(), "dtype": dtype}


def revived(value: Any) -> Any:
    """What `plain` was given; ValueError in one line for what it never gives."""
    try:
        return parts_of(value)
    except (TypeError, ValueError, RuntimeError):  # too deep, too, is a RuntimeError
        told = "the state of a callback is not as it was written"
        raise ValueError(f"resume: the checkpoint is damaged ({told}); choose another checkpoint.") from None


def parts_of(value: Any) -> Any:
    if isinstance(value, list):
        return [parts_of(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tuple": items}:
            return tuple(parts_of(items))
        case {"dict": pairs}:
            return {parts_of(key): parts_of(item) for key, item in pairs}
        case {"tensor": numbers, "dtype": str(dtype)} if dtype in DTYPES:
            return torch.tensor(numbers, dtype=DTYPES[dtype])
    raise ValueError(value)
