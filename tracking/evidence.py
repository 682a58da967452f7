"""What a run shows of its computation so that two runs can be compared: samples, losses, gradient norms, weights.

Imports no torch: who compares runs is told of a mistake at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TRAITS = "traits.json"


def modules_path(folder: Path, rank: int) -> Path:
    """Where a rank writes down what its modules gave in one step."""
    return folder / f"modules.{rank}.json"


@dataclass(frozen=True)
class Evidence:
    """The evidence of all ranks of one run."""

    samples: list[list[str]]  # per step: digests of all samples, sorted
    losses: list[float]  # per step: mean over micro-batches and data ranks
    gradient_norms: list[list[float]]  # per step: what each rank measured
    val_losses: list[float]  # what each rank measured
    weights: list[dict[str, np.ndarray]]  # per rank: every parameter it showed
    first_weights: list[dict[str, np.ndarray]] = field(default_factory=list)  # before the first step
    modules: list[dict[str, Any]] = field(default_factory=list)  # per rank: what modules gave in one step, if asked for
    traits: dict[str, Any] = field(default_factory=dict)  # what plain Lightning's run noticed of the model

    @classmethod
    def load(cls, run_dir: Path) -> Evidence:
        """Read the evidence of a finished run; ValueError if the folder has none."""
        traits = run_dir / "evidence" / TRAITS
        paths = sorted((run_dir / "evidence").glob("[0-9]*.json"), key=lambda path: int(path.stem))
        if not paths:
            raise ValueError(f"{run_dir} holds no evidence; run it with evidence=true.")
        ranks = [json.loads(path.read_text()) for path in paths]
        held = [modules_path(run_dir / "evidence", rank["rank"]) for rank in ranks]
        # Ranks that share a data rank (tensor, pipe) see the same samples: one of them speaks for all.
        speakers = list({rank["data_rank"]: rank for rank in reversed(ranks)}.values())
        num_steps = min(len(rank["steps"]) for rank in ranks)
        return cls(
            samples=[sorted(s for rank in speakers for s in rank["steps"][i]["samples"]) for i in range(num_steps)],
            losses=[float(np.mean([rank["steps"][i]["losses"] for rank in speakers])) for i in range(num_steps)],
            gradient_norms=[[rank["steps"][i]["gradient_norm"] for rank in ranks] for i in range(num_steps)],
            val_losses=[rank["val_loss"] for rank in ranks if rank["val_loss"] is not None],
            weights=[dict(np.load(path.with_suffix(".npz"), allow_pickle=False)) for path in paths],
            first_weights=[dict(np.load(path.with_suffix(".first.npz"), allow_pickle=False)) for path in paths],
            modules=[json.loads(path.read_text()) for path in held if path.exists()],
            traits=json.loads(traits.read_text()) if traits.exists() else {},
        )
