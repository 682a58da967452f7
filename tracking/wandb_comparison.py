"""What belongs to several runs, in W&B: a comparison's page and certificates, as artifacts of a small run."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import wandb

from tracking.sources import Run
from tracking.wandb_config import COMPARE, WandbConfig
from tracking.wandb_run import TROUBLE, finish_run, first_line, say, start_run, sync_command

UNNAMEABLE = re.compile(r"[^\w.-]")  # what the name of an artifact may not hold


class Kept(NamedTuple):
    """A file, and the artifact that it becomes."""

    path: Path
    name: str
    kind: str


def log_comparison(runs: Sequence[Run], page: Path, config: WandbConfig) -> str | None:
    """Log the page, and the certificates of `runs`, in the group of `config`, as `log_artifacts` does."""
    kept = [Kept(page, f"compare-{config.group or page.parent.name}", "comparison")]
    for run in runs:
        if run.folder is not None and (run.folder / "certificate.json").is_file():
            kept.append(certificate(run.folder / "certificate.json", run.strategy or run.name))
    return log_artifacts(kept, config, folder=page.parent)


def certificate(path: Path, strategy: str) -> Kept:
    return Kept(path, f"certificate-{strategy}", "certificate")


def log_artifacts(kept: Sequence[Kept], config: WandbConfig, *, folder: Path) -> str | None:
    """Log files in a W&B run that lies in `folder` and is named like its group; None when W&B is disabled.

    Where they now are: an address, or the command that uploads them.
    """
    run = start_run(config, run_dir=folder, job_type=COMPARE, name=config.group or COMPARE, run_config={})
    if run is None:
        return None
    try:
        for number, one in enumerate(kept):
            run.log_artifact(_artifact(one, Path(run.settings.sync_dir, "artifacts", str(number))))
    except (*TROUBLE, OSError) as error:
        say(f"not all artifacts are logged ({first_line(error)}).")
    finally:
        finish_run(run, ok=True)
    return sync_command(run) if run.settings.mode == "offline" else run.url


def _artifact(kept: Kept, folder: Path) -> wandb.Artifact:
    """Of a copy in `folder`, with the run: W&B would make one in the user's home, far from what is to be synced."""
    artifact = wandb.Artifact(UNNAMEABLE.sub("-", kept.name), type=kept.kind)
    folder.mkdir(parents=True)
    artifact.add_file(str(shutil.copy2(kept.path, folder)), policy="immutable", skip_cache=True)
    return artifact
