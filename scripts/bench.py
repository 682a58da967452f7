"""Benchmarks of Concord's Trainer against bare loops, interleaved step by step in the same processes.

python scripts/bench.py overhead [override ...]   our DDP and a plain PyTorch loop
python scripts/bench.py zero [override ...]       our ZeRO-1, 2 and 3, each with a plain DeepSpeed loop
python scripts/bench.py save [override ...]       what a checkpoint takes, written at once and asynchronously
python scripts/bench.py meter [override ...]      what a tracer costs the steps that it does not trace
python scripts/bench.py grid [override ...]       our fsdp, tensor, pipeline and 2d, each with torch's own parts by hand
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.installed import check_installed

check_installed()

from launch.compose import REPOSITORY, compose
from launch.dispatch import prepare
from launch.schema import ConfigError
from launch.typed import read_words
from launch.wording import MISTAKES, one_line
from launch.zygote import end_zygote

SETTING = [
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
SAVES = ["checkpoint.every_steps=4", "checkpoint.keep_last=1", "trainer.max_steps=48", "data.sequence_length=128"]
SHORT_STEPS = ["model=gpt_tiny", "data.tokenizer=bytes", "trainer.max_steps=200", "trainer.log_every_steps=1000"]
WHOLE_BATCH = "data.micro_batch_size=16"  # of one data rank: nothing is to be accumulated
BENCHMARKS = {
    "overhead": [["strategy=ddp"]],
    # One thread each: as on a machine with GPUs, there is a core that training leaves to the writer.
    "save": [
        ["strategy=single", "launcher.devices=1", "launcher.threads_per_rank=1", WHOLE_BATCH, *SAVES],
        ["strategy=zero1", *SAVES],
    ],
    "meter": [["strategy=ddp", *SHORT_STEPS], ["strategy=pipeline", WHOLE_BATCH, *SHORT_STEPS]],
    "zero": [["strategy=zero1"], ["strategy=zero2"], ["strategy=zero3"]],
    "grid": [
        ["strategy=fsdp"],
        ["strategy=tensor", WHOLE_BATCH],
        ["strategy=pipeline", WHOLE_BATCH],
        ["strategy=2d", "launcher.devices=4"],
    ],
}


def measure(name: str, case: list[str], overrides: list[str]) -> int:
    """Run this script once per rank under torchrun, as `rank`."""
    words = [*SETTING, *case, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(compose([*words, f"run_dir='{folder}'"]))
        end_zygote()  # torchrun starts these ranks
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.world_size}"]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.config.launcher.threads_per_rank),
            "PYTHONPATH": str(REPOSITORY),
        }
        command = [sys.executable, *torchrun, __file__, "rank", name, *words, f"run_dir='{folder}'"]
        return subprocess.run(command, env=environment).returncode


def rank(name: str, words: list[str]) -> int:
    from launch.bench import measure_overhead, measure_saving, measure_tracing

    job = prepare(compose(words), int(os.environ["WORLD_SIZE"]), write=os.environ["RANK"] == "0")
    end_zygote()
    {"save": measure_saving, "meter": measure_tracing}.get(name, measure_overhead)(job)
    return 0


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    match arguments:
        case ["rank", name, *words]:
            return rank(name, words)
        case [name, *overrides] if name in BENCHMARKS:
            overrides = read_words(overrides, {})
            return max(measure(name, case, overrides) for case in BENCHMARKS[name])
    raise ConfigError(f"bench.py: {arguments[0]} is no benchmark; choose one of {', '.join(BENCHMARKS)}.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MISTAKES as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
