"""What a rank needs in memory to save: a tensor of its own part at a time, or a copy of that part; never the model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from launch.checkpoints import Checkpoints
from launch.job import Job
from launch.worker import train
from strategies.checkpoint import Manifest, checkpoints
from tests.agreement.training import job_of, run_job

MB = 1e6
SLACK = 8 * MB  # manifests, file buffers and what else the interpreter takes meanwhile
NET = [
    "model=gpt_tiny",
    "model.net.num_layers=8",
    "model.net.num_heads=8",
    "model.net.num_kv_heads=8",
    "model.net.hidden_size=384",
    "model.net.mlp_size=1024",
    "data=text",
    "data.sequence_length=32",
    "data.global_batch_size=4",
    "data.max_val_samples=4",
    "trainer.max_steps=2",
    "checkpoint.every_steps=1",
    "checkpoint.at_end=false",
    "logger=none",
    "evidence=true",
    "launcher.accelerator=cpu",
    "launcher.devices=2",
]


def resident(key: str) -> int:
    """Bytes of memory that this process has (VmRSS), or has had at most (VmHWM): proc_pid_status(5)."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peaks(Callback):
    """By how much the memory of a rank grew, at most, in its first save."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        saving = next(callback for callback in callbacks if isinstance(callback, Checkpoints))
        save = saving.save

        def measured(trainer: Trainer) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now: proc_pid_clear_refs(5)
            before = resident("VmRSS")
            save(trainer)
            saving.writer.wait()
            path = Path(trainer.default_root_dir) / f"peak-{trainer.global_rank}.json"
            if not path.exists():
                path.write_text(json.dumps(resident("VmHWM") - before))

        saving.save = measured  # type: ignore[method-assign]


def train_rank(job: Job) -> None:
    train(job, callbacks=[Peaks()])


@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "asynchronous"),
    [("zero3", False), ("zero3", True), ("fsdp", True), ("tensor", False), ("zero1", True)],
)
def test_rank_that_saves_needs_a_tensor_at_once_or_a_copy_of_its_part(
    strategy: str, asynchronous: bool, tmp_path: Path
) -> None:
    micro_batch = 4 if strategy == "tensor" else 2
    words = [f"strategy={strategy}", f"data.micro_batch_size={micro_batch}"]
    job = job_of([*NET, *words, f"checkpoint.asynchronous={str(asynchronous).lower()}"], tmp_path)
    run_job(job, train_rank, job)
    manifest = Manifest.read(checkpoints(tmp_path)[-1])
    parts = [file.size for file in manifest.files.values()]
    largest = 4 * max(piece.box.numel for stored in manifest.tensors.values() for piece in stored.pieces)
    block = sum(
        4 * piece.box.numel for name, one in manifest.tensors.items() if ".blocks.0." in name for piece in one.pieces
    )
    assert min(parts) > block + SLACK > largest + SLACK  # or else nothing would be told apart
    for rank, part in enumerate(parts):
        grown = json.loads((tmp_path / f"peak-{rank}.json").read_text())
        print(f"{strategy} {rank}: {grown / MB:.1f} MB beyond its own {part / MB:.1f}; a block: {block / MB:.1f}")
        assert grown <= (part if asynchronous else largest) + SLACK
