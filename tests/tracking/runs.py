"""Made runs whose figures are known."""

from collections.abc import Sequence
from typing import Any

from tests.tracking.examples import record, results
from tracking.history import history_of
from tracking.record import Collective, Memory, Mesh
from tracking.sources import Event, Run

GIB = 2**30
STEPS = (10, 20, 30)


def run(
    name: str,
    *,
    tokens_per_s: float | None = 1000.0,
    ranks: int = 1,
    peak_gib: float = 1.0,
    losses: Sequence[float] = (4.0, 3.0, 2.0),
    val_losses: Sequence[float] = (),
    step_ms: float = 100.0,
    seed: int = 1,
    config: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    found: dict[str, Any] | None = None,
    **of_run: Any,
) -> Run:
    """A run of `len(losses)` rows, ten steps apart; `changes` go to its record, `found` to its results."""
    rows = [
        {"step": float(step), "train/loss": loss, "perf/step_ms": step_ms}
        for step, loss in zip(STEPS, losses, strict=False)
    ]
    for row, loss in zip(rows, val_losses, strict=False):
        row["val/loss"] = loss
    reached = results(
        **{"steps": 30, "train_loss": losses[-1], "tokens_per_s": tokens_per_s, "step_ms_p50": step_ms}
        | {"peak_gib": [peak_gib] * ranks}
        | (found or {})
    )
    made = record(
        **{
            "name": name,
            "strategy": name,
            "seed": seed,
            "world_size": ranks,
            "mesh": Mesh(pipe=1, data=ranks, tensor=1),
            "config": {"seed": seed, "data": {"seed": seed, "files": None}, "strategy": {"name": name}}
            | (config or {}),
            "results": reached,
        }
        | (changes or {})
    )
    given = {"state": "completed", "history": history_of(rows)} | of_run
    return Run(name=name, strategy=made.strategy, record=made, **given)


def failed(name: str) -> Run:
    return Run(name=name, strategy=name, state="failed", error="rank 0: <b>no</b> memory")


def measured(ranks: int = 2) -> dict[str, Any]:
    """Results of version 2, as a tracer leaves them."""
    held = Memory(
        parameters=GIB, gradients=GIB // 2, optimizer=2 * GIB, buffers=0, activations=GIB // 4, other=GIB // 4
    )
    sent = [
        Collective(collective="all-reduce", axis="data", ranks=ranks, calls=4, payload=6e6, seconds=0.002),
        Collective(collective="all-gather", axis="data", ranks=ranks, calls=1, payload=2e6, seconds=None),
    ]
    return {
        "memory": [held] * ranks,
        "memory_limit": 8 * GIB,
        "traffic": [sent] * ranks,
        "wait_share": ([0.1, 0.3] * ranks)[:ranks],
        "idle_share": ([0.0, 0.1] * ranks)[:ranks],
        "traced_steps": [29, 30],
    }


def trace(ranks: int = 2, steps: int = 2) -> list[Event]:
    """Per step and rank: forward 10 ms, backward 20 ms with a collective beside it, optimizer 5 ms, then 6."""
    events = []
    for step in range(steps):
        for rank in range(ranks):
            start = 40_000.0 * step + 100.0 * rank
            for category, lane, after, duration in (
                ("forward", 0, 0, 10),
                ("backward", 0, 10, 20),
                ("collective", 1, 15, 10),
                ("optimizer", 0, 30, 5 + step),
            ):
                events.append(
                    Event(
                        category=category,
                        name=category,
                        rank=rank,
                        lane=lane,
                        start=start + 1000 * after,
                        duration=1000.0 * duration,
                        details={"micro_batch": 0} if category in ("forward", "backward") else {},
                    )
                )
    return events
