"""One rank of a run: builds data, model, strategy and Trainer, fits, and records. Never imports Hydra's main.

Forked by the agent, or run by it as `python -m launch.worker <run folder>`; torchrun's variables say which rank it is.
"""

from __future__ import annotations

import time

IMPORTED = time.time()

from launch.lifeline import die_with_parent
from launch.signals import leave_to_dispatcher

if __name__ == "__main__":
    die_with_parent()  # before the seconds that importing torch takes
    leave_to_dispatcher()

import copy
import faulthandler
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, cast

import numpy as np
import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy

from datamodules.loading import BatchDataset
from datamodules.spec import SampledData
from launch.batches import end_by_batches
from launch.checkpoints import Checkpoints
from launch.counting import CountsFirstBatch, counted
from launch.dispatch import EXIT_FAILED, STARTED, load_resolved
from launch.epochs import Epochs
from launch.failure import first_words, is_worded, raised_inside, record_error
from launch.groups import Start
from launch.guests import Guests, build_callbacks
from launch.job import Job, run_of
from launch.looks import nan_finders, profilers, recorder_of
from launch.offer import Offered, offering
from launch.output import log_path, own_output
from launch.recording import environment_of, observer_of, record_of
from launch.restore import Complete, Restore
from launch.schema import ConfigError, RunConfig
from launch.signals import EndedError
from launch.still import Still, WithoutDropout
from launch.watchdog import Watchdog
from launch.weights import StartingWeights
from models.stats import ModelStats
from models.steps import steps_done
from strategies.engines.construction import Construction, keep, written_down
from strategies.engines.draws import left_alone
from strategies.engines.finite import StepGuard
from tracking import record
from tracking.evidence_recorder import EvidenceRecorder, ShowsState
from tracking.meter import Meter, measure_peak_flops
from tracking.module_recorder import ModuleRecorder
from tracking.progress import Progress
from tracking.tracing import StepTracer
from tracking.validation import SharedValidation
from tracking.wandb_config import new_run_id
from tracking.wandb_logger import RunLogger, finish_wandb, log_record
from tracking.wandb_run import start_run


class Guarded(Protocol):
    """What every engine has to keep NaN and infinity from the weights."""

    guard: StepGuard


class ValidateAtEnd(Callback):
    """A run's last step is validated, also when `trainer.val_every_steps` does not divide `trainer.max_steps`."""

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if steps_done(trainer) >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates before it stops early, not when max_steps is reached


class LeaveWord(Callback):
    """Records what ended training at once: Lightning's teardown may fail in turn and hide it."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir, self.rank = run_dir, rank

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, EndedError):
            return
        with suppress(OSError):  # the disk may be what is full
            record_error(self.run_dir, self.rank, exception)


def build_model(config: RunConfig) -> LightningModule:
    """The LightningModule that the config describes; ValueError in one line if its `_target_` or keys are wrong."""
    construction = Construction()
    Offered.was_called = False
    try:
        with written_down(construction):
            model = instantiate(offering(config.model, config.optimizer), _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException | ImportError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError) and str(error).find(f"'{cause.name}") >= 0:  # it is what is named
            raise ConfigError(f"model: {first_words(cause)}; correct its _target_.") from None
        if is_worded(cause) or isinstance(cause, InstantiationException):
            raise ConfigError(f"model: {first_words(cause)}" if cause is error else first_words(cause)) from None
        if isinstance(cause, TypeError) and not raised_inside(cause):
            raise ConfigError(f"model: {first_words(cause)}; correct model._target_, or the keys beside it.") from None
        raise cause from None  # of the user's own code: type and line are told
    if not isinstance(model, LightningModule):
        raise ConfigError(f"model._target_={config.model.get('_target_')} is not a LightningModule.")
    keep(construction, model)
    return model


def on_meta(model: LightningModule) -> LightningModule:
    """A copy of the model with its net on the meta device."""
    shadow = copy.deepcopy(model)
    shadow.configure_model()
    return shadow.to("meta")


def stats_of(model: LightningModule, job: Job) -> ModelStats | None:
    """Counts of a training step of the model, which is on the meta device.

    None where they cannot be made: no sample to count with, or a step that needs values.
    """
    data = job.data
    return counted(model, lambda: first_sample(data)) if isinstance(data, SampledData) else None


def first_sample(data: SampledData) -> Any:
    """A batch of one sample, by which a step can be tried or counted."""
    return BatchDataset(data.train_samples())[np.zeros(1, dtype=np.int64)]


def loggers(job: Job, rank: int, run_id: str) -> list[Logger]:
    """metrics.csv, and W&B unless it is disabled; ranks but the first have such, too, which write nothing."""
    config = job.config
    csv = CSVLogger(save_dir=job.run_dir, name="", version="")
    if rank:
        return [csv] if config.logger.mode == "disabled" else [csv, WandbLogger(save_dir=job.run_dir)]
    run = start_run(
        config.logger,
        run_dir=job.run_dir,
        job_type=config.strategy["name"],
        name=config.name,
        run_config=config.model_dump(),
        run_id=run_id,
    )
    tokens_per_step = job.data.global_batch_size * job.data.tokens_per_sample
    return [csv] if run is None else [csv, RunLogger(run, save_dir=job.run_dir, tokens_per_step=tokens_per_step)]


def build_trainer(
    job: Job, model: LightningModule, engine: Strategy, callbacks: list[Callback], sinks: list[Logger]
) -> Trainer:
    config, trainer = job.config, job.config.trainer
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    validate_every = trainer.val_every_steps or trainer.max_steps
    made = Trainer(
        accelerator=config.launcher.accelerator,
        devices=local_world_size,
        num_nodes=job.world_size // local_world_size,
        strategy=engine,
        plugins=[TorchElasticEnvironment()],
        max_steps=trainer.max_steps,
        accumulate_grad_batches=job.accumulation,
        gradient_clip_val=trainer.clip_norm,
        val_check_interval=validate_every * job.accumulation,
        check_val_every_n_epoch=None,  # count from the start of the run: there are no epochs here
        num_sanity_val_steps=0,
        log_every_n_steps=min(trainer.log_every_steps, trainer.max_steps),  # Lightning warns where it is more
        logger=sinks,
        callbacks=callbacks,
        use_distributed_sampler=False,  # datamodules.order decides who sees what
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=job.run_dir,
    )
    if not model.automatic_optimization:
        end_by_batches(made)
    # Checkpoints answers signals. Lightning would talk to all ranks from inside of a handler, and before every batch.
    made._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    made.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return made


def train(
    job: Job,
    *,
    terminal: TextIO | None = None,
    log: TextIO | None = None,
    stderr: TextIO | None = None,
    callbacks: Sequence[Callback] = (),
    stats: ModelStats | None = None,
) -> int:
    """Train one rank to the end; rank 0 writes the run's record. The signal that ended the run before that, or 0.

    `callbacks` come before Concord's own, so that those see what they do. With a `terminal` there is a live bar, and
    what is printed meanwhile goes above it and into `log`. `stats` are the model's, where they are known already.
    A run that hangs says so on `stderr`, if it is given.
    """
    rank = int(os.environ["RANK"])
    recorder = recorder_of(job.config, job.run_dir, rank)
    watchdog = Watchdog(
        job.run_dir,
        rank=rank,
        world_size=job.world_size,
        startup_timeout_s=job.config.launcher.startup_timeout_s,
        timeout_s=job.config.launcher.timeout_s,
        terminal=stderr,
        leave_more=recorder and recorder.dump,
    )
    with watchdog.watching():
        recorders = [recorder] if recorder else []
        callbacks = [*callbacks, *recorders]
        return train_watched(job, watchdog, terminal=terminal, log=log, callbacks=callbacks, stats=stats)


def train_watched(
    job: Job,
    watchdog: Watchdog,
    *,
    terminal: TextIO | None,
    log: TextIO | None,
    callbacks: Sequence[Callback],
    stats: ModelStats | None,
) -> int:
    """All of `train` that may hang."""
    config, rank = job.config, watchdog.rank
    quiet()
    torch.set_float32_matmul_precision("highest")  # fp32 means fp32, not TF32
    seed_everything(config.seed, workers=True, verbose=False)
    if job.extensions:
        prepare_extensions(job)
    model = build_model(config)
    made = build_callbacks(config, job.strategy)
    if config.evidence == "plain":
        from launch.plain import train_plainly  # no other run needs it

        train_plainly(job, model, made)
        return 0
    guests = Guests(job)
    guests.meet(model)
    peak_flops = None if config.evidence else peak_of_device(config)  # first, while all ranks are at the same point
    watchdog.beat()
    with left_alone(torch.device("cpu")):  # a net that is built eagerly is to draw what it would without us
        shadow = on_meta(model)
        # Counted where it is of use: rank 0 logs it (not of a run that is made to be compared), grids cut by it.
        if stats is None and ((rank == 0 and not config.evidence) or job.mesh.cuts):
            stats = stats_of(shadow, job)
    size = record.Stats(
        parameters=sum(parameter.numel() for parameter in shadow.parameters()),
        flops_per_sample=stats.flops_per_sample if stats else None,
    )
    watchdog.beat()
    run_id = new_run_id()
    sinks = loggers(job, rank, run_id)
    completed = False
    try:
        engine = job.strategy.build(run_of(config, job.data, config.launcher.accelerator, stats))
        watchdog.beat()
        cast(Guarded, engine).guard.skips = config.trainer.on_nan == "skip"
        traced = trace_steps(config, model)
        meter = build_meter(job, engine, size, peak_flops, traced)
        tracer = StepTracer(job.run_dir, {axis: int(size) for axis, size in job.mesh.sizes.items()}, traced)
        progress = Progress(meter, terminal=terminal, log=log)
        observer, validation, epochs = observer_of(job), SharedValidation(), Epochs()
        own: list[Callback] = [watchdog, LeaveWord(job.run_dir, rank), ValidateAtEnd(), epochs]
        if rank == 0 and not config.evidence and not isinstance(job.data, SampledData):
            own.append(CountsFirstBatch(shadow, meter, job.data.micro_batch_size))  # till now there was no sample
        own += [tracer, *profilers(config, job.run_dir, traced), meter, progress, *nan_finders(config)]
        if config.evidence:
            own.append(EvidenceRecorder(job.run_dir))
            if config.evidence_step is not None:
                own.append(ModuleRecorder(job.run_dir, config.evidence_step))
        own.append(start := Start())
        if config.resume is not None:
            own.append(Restore(job))
        elif config.weights is not None:
            own.append(StartingWeights(Path(config.weights), model, config.fitting))
        own += [validation, observer, Checkpoints(job, guests, start, watchdog.beat)]
        if config.resume is not None:
            own.append(Complete(meter))
        mode = WithoutDropout(model) if config.evidence else None
        if mode is not None:
            own.append(Still(mode))
        # Compiled blocks would be compiled with the mode; `Still` is enough for them.
        data = job.data.build()
        here = environment_of(job) if rank == 0 else None  # now: files may have changed when training is over
        with mode if mode is not None and not config.compile else nullcontext():
            trainer = build_trainer(job, model, engine, [guests, *callbacks, *made, *own], sinks)
            trainer.fit(model, datamodule=data)
        if here is not None:
            results = meter.results().model_copy(update={**tracer.results, "val_of_one_rank": validation.own})
            size = size.model_copy(update={"flops_per_sample": meter.flops_per_sample})
            order = epochs.order.described if epochs.order else None
            dtypes = cast(ShowsState, engine).dtypes
            result = record_of(job, run_id, results, size, dtypes, order, found=observer.found, environment=here)
            result.write(job.run_dir / "record.json")
            log_record(sinks, result, job.run_dir)
        completed = True
    except EndedError as ending:
        return ending.number
    finally:
        watchdog.stop()  # a server that does not answer is no rank that hangs
        finish_wandb(sinks, ok=completed)
    return 0


def prepare_extensions(job: Job) -> None:
    """Let DeepSpeed load what the dispatcher has had built, whatever the model or the optimizer imports first."""
    from strategies.engines.deepspeed import import_deepspeed
    from strategies.engines.extensions import ensure_built

    import_deepspeed(on_gpu=job.config.launcher.accelerator == "gpu")
    ensure_built(job.extensions)


def peak_of_device(config: RunConfig) -> float:
    """FLOP/s that this rank's device gives when every rank computes at once."""
    on_gpu = config.launcher.accelerator == "gpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    return measure_peak_flops(getattr(torch, config.precision.compute), device)


def build_meter(job: Job, engine: Strategy, size: record.Stats, peak_flops: float | None, traced: int) -> Meter:
    guard = cast(Guarded, engine).guard
    return Meter(
        samples_per_step=job.data.global_batch_size,
        tokens_per_sample=job.data.tokens_per_sample,
        flops_per_sample=size.flops_per_sample,
        peak_flops=peak_flops,
        log_every_steps=job.config.trainer.log_every_steps,
        started_at=float(os.environ.get(STARTED, IMPORTED)),
        offers=lambda: {"optim/grad_norm": cast(ShowsState, engine).gradient_norm()},
        loss_factor=lambda: guard.terms.factor,
        skipped_steps=(lambda: guard.skipped_steps) if guard.skips else None,
        trace_steps=traced,
        profiled=job.config.profile.disturbed if job.config.profile else (),
    )


def trace_steps(config: RunConfig, model: LightningModule) -> int:
    """How many steps are traced: none of a run that is made to be compared, nor where one training step is all."""
    return 0 if config.evidence or not model.automatic_optimization else config.trainer.trace_steps


def quiet() -> None:
    """Leave to the terminal what concerns the user; Lightning's tips and notices stay out."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # Concord's loaders gather from memory: workers would only add a copy.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning 2.6 asks torch's pytree in a way that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # With float16 a step that overflows is left out, the very first one too.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
    # Under torch.compile, inductor imports what torch 2.13 deprecates, and dynamo asks any tensor for its gradient.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor", UserWarning)
    # tracking.validation does so itself where a module does not.
    warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*, sync_dist=True\)`")
    # FSDP2: nothing is changed in place between the modules of a chain, and what leaves it is no view.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    # metrics.csv lies in the run folder itself, beside files that are there before it.
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")


def leave_word(run_dir: Path, rank: int) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """An excepthook that records the cause for the dispatcher and ends the process at once.

    At once, because what a rank does at exit (destroying process groups) can wait for ranks that will never answer.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with suppress(OSError):  # on a full disk there is no place for last words
            record_error(run_dir, rank, error)
            with log_path(run_dir, rank).open("a") as log:
                traceback.print_exception(kind, error, trace, file=log)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    return hook


def run_rank(job: Job, *, dispatched: bool = False) -> int:
    """Train this rank with its output in its log: as `train`; if it fails, leave word and end the process.

    Where there is no dispatcher that reads what ranks leave, a hang is told on stderr.
    """
    rank = int(os.environ["RANK"])
    with suppress(OSError):  # what ps and top call this process; Linux alone takes it so
        Path("/proc/self/comm").write_text(f"rank {rank} of {job.world_size}")
    stderr = None if dispatched else os.fdopen(os.dup(2), "w")
    terminal = own_output(job.run_dir, rank)
    faulthandler.enable()
    sys.excepthook = leave_word(job.run_dir, rank)
    with log_path(job.run_dir, rank).open("a") as log:
        number = train(job, terminal=terminal, log=log if terminal else None, stderr=stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return number


if __name__ == "__main__":
    run_rank(Job.of(load_resolved(Path(sys.argv[1]))), dispatched=True)
