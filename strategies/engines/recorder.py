"""debug=flight_recorder: the last collectives of each rank when the run hangs, or of one that fails."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed.distributed_c10d import _world


@final
class FlightRecorder(pl.Callback):
    """Torch's flight recorder, with gloo as with NCCL; make it before the process group, which then records.

    flight_recorder/rank<n>.json is to be read, flight_recorder/dumps/rank<n> for `torchfrtrace`.
    """

    def __init__(self, run_dir: Path, *, rank: int, entries: int) -> None:
        self.folder, self.rank = run_dir / "flight_recorder", rank
        self.dumps = self.folder / "dumps"
        self.dumped = threading.Event()
        os.environ["TORCH_FR_BUFFER_SIZE"] = str(entries)
        # NCCL's own watchdog dumps by itself, if it is earlier than ours.
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(self.dumps / "rank")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.dumps.mkdir(parents=True, exist_ok=True)
        recorded()  # the first look at stacks takes seconds, the others none

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.dump()

    def dump(self) -> None:
        # Of a run that hangs, the first: when the other ranks end, the collective that this one waits for fails.
        if not dist.is_initialized() or self.dumped.is_set():
            return
        self.dumped.set()
        self.dumps.mkdir(parents=True, exist_ok=True)
        trace = recorded()
        (self.folder / f"rank{self.rank}.json").write_text(json.dumps(trace, indent=1, default=str))
        (self.dumps / f"rank{self.rank}").write_bytes(pickle.dumps(trace))


def recorded() -> dict[str, Any]:
    """What this rank has recorded: the entries of its collectives, and the groups that they were in."""
    recorders: Any = _distributed_c10d
    dump = recorders._dump_nccl_trace if dist.get_backend() == "nccl" else recorders._dump_fr_trace
    trace: dict[str, Any] = pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
    # Gloo in torch 2.13 does not name its groups; torchfrtrace looks them up by their names.
    trace["pg_config"] = {
        group.group_name: {
            "name": group.group_name,
            "desc": group.group_desc,
            "ranks": json.dumps(dist.get_process_group_ranks(group)),
        }
        for group in _world.pg_map
    }
    return trace
