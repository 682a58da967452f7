"""callbacks=: which of Lightning's go with a run here, and what to use instead of the others. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from strategies.spec import Strategy

if TYPE_CHECKING:
    from launch.schema import RunConfig

LIGHTNING = ("lightning.pytorch.callbacks.", "pytorch_lightning.callbacks.")
EMA = "strategies.engines.ema.EMA"

# Callbacks that leave every optimizer step as it is: they look, or end the run. Two runs that differ in these alone
# train the same thing the same way.
ENDING = ("EarlyStopping", "Timer")
WATCHING = ("DeviceStatsMonitor", "LearningRateMonitor", "ModelSummary", "RichModelSummary", *ENDING)

SAVED_HERE = (
    "saves what one rank holds of a model; leave it out, and set checkpoint.every_steps, checkpoint.keep_last and "
    "checkpoint.keep_best."
)
AVERAGED_HERE = "averages a copy of a whole model, which no rank need have; leave it out, and choose callbacks=ema."
FROZEN_HERE = (
    "gives the optimizer more parameters on the way, which neither shards nor checkpoints know of; leave it out: "
    "freeze in the module, then train all of it in a second run with model.weights=<run folder of the first>."
)
DRAWN_HERE = "draws where a bar is drawn already; leave it out."

# What is said of those that do not go with a run here, under whatever strategy.
INSTEAD: Mapping[str, str] = {
    "Checkpoint": SAVED_HERE,
    "ModelCheckpoint": SAVED_HERE,
    "OnExceptionCheckpoint": (
        "saves what one rank holds while others wait; leave it out, set checkpoint.every_steps, and go on by "
        "resume=auto."
    ),
    "WeightAveraging": AVERAGED_HERE,
    "EMAWeightAveraging": AVERAGED_HERE,
    "StochasticWeightAveraging": AVERAGED_HERE,
    "GradientAccumulationScheduler": (
        "changes the global batch on the way; leave it out, and set data.global_batch_size, from which accumulation "
        "follows."
    ),
    "BatchSizeFinder": "trains by samples that no step sees; leave it out, and set data.micro_batch_size.",
    "LearningRateFinder": "trains, and starts again, within a run; leave it out, and search by -m hparams=lr.",
    "BaseFinetuning": FROZEN_HERE,
    "BackboneFinetuning": FROZEN_HERE,
    "ModelPruning": (
        "puts other parameters in the place of those that a strategy has spread; leave it out, and prune what "
        "scripts/convert.py writes."
    ),
    "SpikeDetection": (
        "wants samples left out, and which samples a step sees is the same in every run; leave it out: trainer.on_nan "
        "says what becomes of a step that is no number."
    ),
    "ThroughputMonitor": (
        "counts the batches of one rank; leave it out: every run has perf/tokens_per_s, perf/step_ms and perf/mfu."
    ),
    "ProgressBar": DRAWN_HERE,
    "RichProgressBar": DRAWN_HERE,
    "TQDMProgressBar": DRAWN_HERE,
    "BasePredictionWriter": (
        "writes predictions, and a run makes none; leave it out, and predict with Lightning from what "
        "scripts/convert.py writes."
    ),
}

# Of these, only strategies whose ranks each keep a whole model give what is asked for.
WHOLE = ("ModelSummary", "RichModelSummary")


def lightnings(target: str) -> str | None:
    """The name of one of Lightning's own callbacks, wherever it was imported from; None of any other class."""
    return target.rpartition(".")[2] if target.startswith(LIGHTNING) else None


def refusal(name: str, strategy: Strategy) -> str | None:
    """Why Lightning's callback of this name does not go with a run here, and what to use; None where it does."""
    if name in WHOLE and not strategy.keeps_whole:
        return (
            f"counts what one rank holds, which under strategy={strategy.name} is a part; leave it out: record.json "
            f"has the whole model's counts in model_stats."
        )
    return INSTEAD.get(name)


def leaves_steps_alone(section: Mapping[str, Any]) -> bool:
    """Whether a callback's config names one that changes no optimizer step."""
    target = str(section.get("_target_"))
    return target == EMA or lightnings(target) in WATCHING


def ends_early(section: Mapping[str, Any]) -> bool:
    return lightnings(str(section.get("_target_"))) in ENDING


def check_callbacks(config: RunConfig, strategy: Strategy) -> None:
    """ValueError for the first of a config's callbacks that does not go with the run, as far as its name tells."""
    for key, section in config.callbacks.items():
        target = str(section["_target_"])
        name = lightnings(target)
        if target == EMA:
            check_average(strategy)
        if name is None:
            continue
        reason = refusal(name, strategy)
        if reason:
            raise ValueError(f"callbacks.{key}: {name} {reason}")
        if name == "EarlyStopping" and config.trainer.val_every_steps is None:
            raise ValueError(
                f"callbacks.{key}: EarlyStopping looks when the run validates, and with trainer.val_every_steps=null "
                f"that is at its last step alone; set trainer.val_every_steps."
            )


def check_average(strategy: Strategy) -> None:
    """The average lies beside what the optimizer keeps, which must lie in memory."""
    if strategy.extensions:
        raise ValueError(
            f"callbacks=ema keeps its average where the optimizer's state lies, which for strategy={strategy.name} is "
            f"an NVMe disk; choose strategy=zero3_offload."
        )
