"""A whole record to write, read, tabulate and log."""

from typing import Any

from tracking.found import Found, Samples, Stepping
from tracking.record import Batch, Environment, Mesh, Precision, Results, RunRecord, Stats


def results(**changes: Any) -> Results:
    values: dict[str, Any] = {
        "steps": 200,
        "train_loss": 2.25,
        "val_loss": 2.5,
        "val_metrics": {"val/loss": 2.5},
        "tokens_per_s": 12345.6,
        "step_ms_p50": 82.94,
        "step_ms_p95": 101.5,
        "mfu": 0.3125,
        "peak_flops_per_device": 1e11,
        "peak_gib": [0.5, 0.75],
        "memory_source": "resident set",
        "warmup_rule": "the first 10",
        "wall_s": 21.5,
        "startup_s": 6.5,
    }
    return Results(**values | changes)


def found(**changes: Any) -> Found:
    """What was found of a net of six elements that AdamW steps, on one rank."""
    values: dict[str, Any] = {
        "optimizers": [Stepping(name="torch.optim.adamw.AdamW", made_with={"lr": 0.1}, groups=[], state=["float32"])],
        "asked": True,
        "parameters": {"float32": 6},
        "masters": ["float32"],
        "gradients": ["float32"],
        "trainable": 6,
        "frozen": 0,
        "buffers": 0,
        "samples": Samples(micro={4: 8}, step={16: 2}, shapes=[[8]]),
        "notes": [],
    }
    return Found(**values | changes)


def record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "run_id": "r1",
        "name": "first",
        "group": None,
        "strategy": "ddp",
        "model": "gpt_tiny",
        "data": "text",
        "seed": 1,
        "config": {"seed": 1, "data": {"files": None}},
        "config_hash": "0123456789ab",
        "environment": Environment(
            python="3.11.7",
            torch="2.13.0",
            lightning="2.6.6",
            revision="1f0c" * 10,
            source="0123456789ab",
            os="Linux 6",
            device="a processor",
            device_count=1,
            cores=2,
            memory_gib=8.0,
        ),
        "world_size": 2,
        "mesh": Mesh(pipe=1, data=2, tensor=1),
        "precision": Precision(name="fp32", parameter="float32", compute="float32", reduce="float32", master="float32"),
        "model_stats": Stats(parameters=1000, flops_per_sample=6e6),
        "batch": Batch(global_=16, micro=4, accumulation=2, tokens_per_sample=64),
        "results": results(),
    }
    return RunRecord(**values | changes)
