"""Benchmarks: `python scripts/bench.py overhead [override ...]` compares our Trainer with a bare PyTorch loop."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.compose import REPOSITORY, compose
from launch.dispatch import prepare
from launch.schema import ConfigError

OVERHEAD = [
    "strategy=ddp",
    "launcher.devices=2",
    "model=gpt_small",
    "data.tokenizer=bpe",
    "data.global_batch_size=16",
    "data.micro_batch_size=8",
    "trainer.max_steps=33",
    "trainer.val_every_steps=null",
    "data.max_val_samples=8",
    "logger=none",
]


def overhead(overrides: list[str]) -> int:
    """Run this script once per rank under torchrun; there, measure."""
    if "RANK" in os.environ:
        from launch.bench import measure_overhead

        run_dir = Path(os.environ["BENCH_DIR"])
        tree = compose([*OVERHEAD, *overrides, f"run_dir='{run_dir}'"])
        measure_overhead(prepare(tree, int(os.environ["WORLD_SIZE"]), write=os.environ["RANK"] == "0"))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tree = compose([*OVERHEAD, *overrides, f"run_dir='{folder}'"])
        job = prepare(tree)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.world_size}"]
        environment = os.environ | {
            "BENCH_DIR": folder,
            "OMP_NUM_THREADS": str(job.config.launcher.threads_per_rank),
            "PYTHONPATH": str(REPOSITORY),
        }
        return subprocess.run([sys.executable, *torchrun, __file__, "overhead", *overrides], env=environment).returncode


if __name__ == "__main__":
    if sys.argv[1:2] != ["overhead"]:
        sys.exit("usage: python scripts/bench.py overhead [override ...]")
    try:
        sys.exit(overhead(sys.argv[2:]))
    except (ConfigError, ValueError) as error:
        sys.exit(str(error))
