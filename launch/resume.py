"""From what a run may go on: which checkpoint `resume` means, and whether it is one of this run's kind."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.attempts import earlier_trees
from launch.job import check_checkpoint
from launch.schema import AUTO, ConfigError, RunConfig, build_spec, leaves
from strategies.checkpoint import MANIFEST, REPLACED, Manifest, UnusableError, checkpoints, newest, recover
from strategies.spec import Strategy

TRAINED = ("model", "data")  # sections that decide what is trained on what
STEPPED = ("model.optimizer.", "model.scheduler.")  # how it is trained may change on the way
DIGEST = "data.digest"
SEEN = {"data.samples", "data.order"}  # of data of the user's own, which only a rank can look at
# Sizes of a net: with another one there are other weights, so that nothing can be gone on with.
SHAPING = re.compile(r"^model\.(.*\.)?(num_\w+|\w*(size|length|width|depth|dim|dims|features|channels|classes|rank))$")
# Keys that change no training sample and no weight.
FREE = {
    "model.net.loss_chunk_tokens",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
    "data.files",  # wherever they lie: what is in them must be the same
    "data.folder",
    "data.max_val_samples",
    "data.val_batch_size",
    "data.loader_batch_size",
}


def resolve_resume(config: RunConfig) -> RunConfig:
    """The config with the very checkpoint that `resume` means; ConfigError if there is none that fits, or is whole."""
    if config.resume is None:
        return config
    if config.resume == AUTO:
        folder = newest_own(Path(config.run_dir))
        if folder is not None:
            print(f"resume=auto: going on from {folder}.", file=sys.stderr)
        elif (before := started_from(Path(config.run_dir))) is not None:
            told = f"{config.run_dir} holds no checkpoint; starting from {before}, as its earlier attempt did."
            print(f"resume=auto: {told}", file=sys.stderr)
            folder = whole(before)
        else:
            print(f"resume=auto: {config.run_dir} holds no checkpoint; starting at step 0.", file=sys.stderr)
            return config.model_copy(update={"resume": None})
        check_checkpoint(
            config.model_copy(update={"resume": str(folder)}), build_spec(config.strategy, "strategy", Strategy)
        )
    else:
        folder = whole(config.resume)
    check_manifest(Manifest.read(folder), folder, config)
    return config.model_copy(update={"resume": str(folder)})


def check_resume(config: RunConfig) -> None:
    """ConfigError if there is no checkpoint that `resume` may mean, or one of another run; reads checkpoint.json."""
    assert config.resume is not None
    folder = find(config.resume)
    try:
        manifest = Manifest.read(folder)
    except ValueError:  # it is damaged: `whole` says more of it
        return
    check_manifest(manifest, folder, config)


def check_manifest(manifest: Manifest, folder: Path, config: RunConfig) -> None:
    """ConfigError if a checkpoint is not one from which this run can go on."""
    check_same(manifest, config)
    if manifest.step > config.trainer.max_steps or (
        manifest.step == config.trainer.max_steps and config.resume != AUTO  # what else there is to do is done again
    ):
        raise ConfigError(
            f"trainer.max_steps={config.trainer.max_steps}, but resume={folder} lies behind {manifest.step} steps; "
            f"raise trainer.max_steps."
        )


def newest_own(run_dir: Path) -> Path | None:
    """The checkpoint that `resume=auto` means, None where a run has made none.

    ConfigError where there are some, but none that can be used: nobody wants to lose what they hold without a word.
    """
    try:
        recover(run_dir)
        folder = newest_good(run_dir)
        if folder is None and checkpoints(run_dir):
            raise ConfigError(
                f"resume=auto: no checkpoint in {run_dir / 'checkpoints'} is whole; to start anew, rename that folder."
            )
    except UnusableError as error:
        raise ConfigError(
            f"resume=auto: {error} It is not passed over; for that, move its folder out of {run_dir / 'checkpoints'}."
        ) from None
    except OSError as error:
        raise ConfigError(f"resume=auto: {error.filename} cannot be read ({error.strerror}); mend that.") from None
    return folder


def started_from(run_dir: Path) -> str | None:
    """The checkpoint of another run that earlier attempts at a run have started from."""
    for tree in earlier_trees(run_dir):
        resume, own = tree.get("resume"), Path(tree.get("run_dir", run_dir)) / "checkpoints"
        if resume is None or Path(resume).parent != own:  # else it is one of its own, gone by now
            return resume
    return None


def whole(resume: str) -> Path:
    """The checkpoint folder that a user means; ConfigError, with an offer where there is one, if it is not whole."""
    folder = find(resume)
    try:
        Manifest.read(folder).check(folder)
    except ValueError as error:
        good = None
        with suppress(UnusableError):
            good = newest_good(folder.parent.parent, before=folder)
        offer = f" {good} is whole." if good else ""
        raise ConfigError(f"resume={resume}: {error}{offer}") from None
    return folder


def newest_good(run_dir: Path, before: Path | None = None) -> Path | None:
    """The newest checkpoint of a run (older than one of them) whose files are as they were written.

    Each that is not is named on the terminal. UnusableError if there is no telling.
    """
    for folder in reversed(checkpoints(run_dir)):
        if before is not None and folder.name >= before.name:
            continue
        try:
            Manifest.read(folder).check(folder)
        except UnusableError:
            raise
        except ValueError as error:
            print(f"resume: {error}", file=sys.stderr)
        else:
            return folder
    return None


def find(resume: str) -> Path:
    """The checkpoint folder that a user means: itself, or the newest of a run folder."""
    path = Path(resume).expanduser().resolve()
    try:
        for folder in (path, path.with_name(path.name + REPLACED)):
            if (folder / MANIFEST).is_file():
                return folder
        found = newest(path) or (newest(path.parent) if path.name == "checkpoints" else None)
    except OSError as error:
        raise ConfigError(f"resume={resume}: {error.filename} cannot be read ({error.strerror}); mend that.") from None
    if found is None:
        raise ConfigError(
            f"resume={resume} is no checkpoint, and no run folder with one; give a folder such as "
            f"runs/<day>/<time>/checkpoints/step-00000100."
        )
    return found


def check_resumed_data(config: RunConfig) -> None:
    """ConfigError if the files at hand hold something else than those that the checkpoint was trained on."""
    if config.resume is None or DIGEST in config.resume_despite:
        return
    before = Manifest.read(Path(config.resume)).trained.get(DIGEST)
    if before != config.data_digest:
        raise ConfigError(
            f"resume={config.resume}: the files of data={config.choices.get('data')} hold something else than what it "
            f"was trained on; give the same files, or resume_despite=[{DIGEST}]."
        )


def check_same(manifest: Manifest, config: RunConfig) -> None:
    before, now = manifest.trained, json.loads(json.dumps(trained(config)))  # in the types that JSON has
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    differing = [key for key in differing if key not in {DIGEST, *SEEN, *FREE, *config.resume_despite}]
    refuse(manifest, now, differing, config)


def check_seen(manifest: Manifest, seen: dict[str, Any], config: RunConfig) -> None:
    """As `check_same`, of what a rank has found out about the data."""
    known = sorted(SEEN & (manifest.trained.keys() | seen.keys()) - set(config.resume_despite))
    refuse(manifest, seen, [key for key in known if manifest.trained.get(key) != seen.get(key)], config)


def refuse(manifest: Manifest, now: dict[str, Any], differing: list[str], config: RunConfig) -> None:
    before = manifest.trained
    if not differing:
        return
    sizes = [key for key in differing if SHAPING.search(key)]
    others = [key for key in differing if key not in sizes]
    key = (sizes or others)[0]
    rest = [one for one in differing if one != key]
    more = f" (and {', '.join(rest)} differ)" if rest else ""
    said = f"{key}={now.get(key)}, but the checkpoint was written with {key}={before.get(key)}{more}; give the same"
    despite = f"resume_despite=[{','.join([*config.resume_despite, *others])}]"
    if sizes and others:
        raise ConfigError(f"{said} {', '.join(sizes)}, by which weights have their shapes; the others may, {despite}.")
    if sizes:
        raise ConfigError(f"{said}: by {', '.join(sizes)} weights have their shapes, which cannot differ.")
    raise ConfigError(f"{said}, or {despite}.")


def trained(config: RunConfig) -> dict[str, Any]:
    """By their dotted keys, the values that decide what is trained on what."""
    tree = config.model_dump()
    every = [pair for section in TRAINED for pair in leaves(tree[section], f"{section}.")]
    return {DIGEST: config.data_digest, **{key: value for key, value in every if not key.startswith(STEPPED)}}
