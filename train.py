"""Train one model under one strategy: `python train.py strategy=ddp`; with -m, sweep over several.

Composes the config, checks it, and starts the processes that train; imports no torch itself. Started by torchrun or
srun, it becomes one of those processes.
"""

import os
import sys

from launch.installed import check_installed

check_installed()
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to launch.entry, which prints one line

import hydra
from omegaconf import DictConfig

from launch.entry import run_application, run_job
from launch.join import join, outer_launcher


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """One run, or one job of a sweep: the validation loss at its end, which sweepers minimise."""
    return run_job(config)


if __name__ == "__main__":
    launcher = outer_launcher()
    sys.exit(run_application(main) if launcher is None else join(launcher, sys.argv[1:]))
