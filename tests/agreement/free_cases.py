"""One model and batch under every strategy, to be saved under one and resumed under another."""

from dataclasses import dataclass, replace

import numpy as np

from tests.agreement.grid_cases import GridCase
from tracking.evidence import Evidence

SAVED = 2  # the optimizer step behind which a run is saved; one more shows what was restored, by loss and by weights


@dataclass(frozen=True, kw_only=True)
class FreeCase(GridCase):
    """The same model and batch under every strategy; 20 samples, so that epochs end in the midst of steps."""

    tied: bool = True
    steps: int = SAVED + 1

    @property
    def micro_batches(self) -> int:
        """As few as keep every stage busy: what is saved does not depend on their number."""
        return self.world_size // self.others_than_pipe

    @property
    def shared(self) -> list[str]:
        # The rate is another in the step behind the checkpoint than in the one before: who restores it wrongly shows.
        return [*super().shared, f"scheduler.warmup_steps={SAVED + 1}"]

    @property
    def net(self) -> list[str]:
        return [
            *(word for word in super().net if not word.startswith(("data=", "model.net.num_layers="))),
            "model.net.num_layers=4",
            "data=synthetic",
            "data.num_samples=20",
        ]


FREE = {
    case.strategy: case
    for case in (
        FreeCase(strategy="single", world_size=1),
        FreeCase(strategy="ddp", world_size=2, accumulation=2),
        FreeCase(strategy="zero1", world_size=2),
        FreeCase(strategy="zero2", world_size=4),
        FreeCase(strategy="zero3", world_size=2, accumulation=2),
        FreeCase(strategy="zero3_offload", world_size=2),
        FreeCase(strategy="fsdp", world_size=4),
        FreeCase(strategy="tensor", world_size=2, accumulation=4),
        FreeCase(strategy="pipeline", world_size=4, schedule="1f1b"),
        FreeCase(strategy="3d", world_size=4),  # one data rank; on 8, where it goes on, it has two
    )
}


# The same strategy goes on with another number of ranks.
RESIZED = {
    strategy: replace(FREE[strategy], world_size=world_size)
    for strategy, world_size in {
        "ddp": 4, "zero1": 4, "zero2": 8, "zero3": 4, "zero3_offload": 4, "fsdp": 2, "pipeline": 2, "3d": 8,
    }.items()
}  # fmt: skip


def same(after: Evidence, whole: Evidence) -> bool:
    """Whether the second half of a run is, bit for bit, that of the run which was not interrupted."""
    scalars = (
        (after.samples, whole.samples[SAVED:]),
        (after.losses, whole.losses[SAVED:]),
        (after.gradient_norms, whole.gradient_norms[SAVED:]),
        (after.val_losses, whole.val_losses),
    )
    weights = zip(after.weights, whole.weights, strict=True)
    return all(ours == theirs for ours, theirs in scalars) and all(
        ours.keys() == theirs.keys() and all(np.array_equal(ours[fqn], theirs[fqn]) for fqn in ours)
        for ours, theirs in weights
    )
