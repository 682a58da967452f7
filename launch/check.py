"""What can be refused of a run before anything is touched or started: by its config, its files' names, the machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.job import resolve
from launch.keys import relative
from launch.resume import check_resume
from launch.schema import AUTO, ConfigError, RunConfig, validate
from launch.start import check_one_start, check_weights_there
from launch.targets import AbsentError, UnknownError, check_targets, definition, sections
from tracking.wandb_config import ENVIRONMENT_MODES


def checked(tree: Mapping[str, Any], world_size: int | None = None, local_world_size: int | None = None) -> RunConfig:
    """The resolved config of a run; ConfigError if it shows that the run cannot go. Starts nothing, writes nothing.

    World sizes are given by a rank of another launcher.
    """
    config = validate(dict(tree))
    check_targets(config.model_dump())
    check_settings(config.model)
    config = resolve(config, world_size, local_world_size)
    check_one_start(config)
    check_logger(config)
    if config.resume_despite and config.resume is None:
        raise ConfigError(
            f"resume_despite=[{','.join(config.resume_despite)}] is for resume=<run or checkpoint>; give that, "
            f"or leave resume_despite out."
        )
    if config.resume not in (None, AUTO):
        check_resume(config)
    elif config.weights is not None:
        check_weights_there(config)
    return config


def check_logger(config: RunConfig) -> None:
    """What W&B's own variable says must be something that it knows."""
    mode = os.environ.get("WANDB_MODE", "")
    if config.logger.mode == "auto" and mode and mode not in ENVIRONMENT_MODES:
        raise ConfigError(
            f"WANDB_MODE={mode} is no mode of W&B; set it to one of {', '.join(ENVIRONMENT_MODES)}, or unset it."
        )


def check_settings(model: Mapping[str, Any]) -> None:
    """Ask the files that lie beside nets, `gpt_settings.py` beside `gpt.py`, whether a net can be made so.

    Such a file imports no torch. Its CHECKS are functions by the names of classes; each takes the class's settings and
    raises a ValueError, in the words of the config, for those of which no net can be made.
    """
    for path, section in sections(model, "model"):
        try:
            found = definition(str(section["_target_"]))
        except (AbsentError, UnknownError):
            continue
        beside = found.path.with_name(f"{found.path.stem}_settings.py")
        if not beside.is_file():
            continue
        settings = {key: value for key, value in section.items() if not key.startswith("_")}
        check = checks_in(beside).get(found.node.name)
        if check is not None:
            run_check(check, settings, path, beside)


def checks_in(path: Path) -> Mapping[str, Any]:
    """The CHECKS of a settings file; ConfigError if it cannot be imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return dict(module.CHECKS)
    except Exception as error:  # noqa: BLE001  # it may be the user's own
        raise ConfigError(f"{relative(path)}: {type(error).__name__}: {error}; mend the file.") from None


def run_check(check: Any, settings: Mapping[str, Any], path: str, beside: Path) -> None:
    try:
        check(**settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except Exception as error:  # noqa: BLE001  # as above
        raise ConfigError(f"{path}: {relative(beside)} raised {type(error).__name__}: {error}") from None
