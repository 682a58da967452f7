"""Which fault is planted in which grid."""

from tests.agreement import faults
from tests.agreement.grid_cases import GridCase

PIPELINE = GridCase(strategy="pipeline")
EVERYDAY_PLANTED = [
    (faults.StagesSwapped, GridCase(strategy="pipeline", schedule="interleaved_1f1b")),
    (faults.MicroBatchDropped, PIPELINE),
    (faults.ClippedByStageNorm, PIPELINE),
    (faults.TiedNotSummed, GridCase(strategy="pipeline", tied=True)),
]
PLANTED = [
    *EVERYDAY_PLANTED,
    (faults.TiedNotSummed, GridCase(strategy="pipeline", tied=True, schedule="zbv")),
    (faults.AveragedTwice, GridCase(strategy="fsdp")),
    (faults.SamplesRepeated, GridCase(strategy="hsdp", world_size=4)),
    (faults.StepSkipped, GridCase(strategy="2d", world_size=4)),
]

# With these a run does not come to its end; test_grid.py plants each.
ENDING = {faults.ReshardedInBetween, faults.NormsPartNotSummed}
