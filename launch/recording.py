"""What of a job goes into its run's record, beside what was measured: its config, and what ran."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from launch.job import Job
from launch.offer import Offered, offers
from tracking import record
from tracking.contradictions import Expected
from tracking.found import Found
from tracking.observer import Observer
from tracking.record import Environment, RunRecord, environment
from tracking.redact import redact


def observer_of(job: Job) -> Observer:
    config = job.config
    expected = Expected(
        optimizer=config.optimizer,
        optimizer_choice=config.choices.get("optimizer"),
        precision=config.precision.name,
        parameter=config.precision.parameter,
        micro_batch=job.data.micro_batch_size,
        global_batch=job.data.global_batch_size,
    )
    is_offered = offers(config.model, config.optimizer)
    return Observer(job.run_dir, expected, lambda: Offered.was_called if is_offered else None)


def environment_of(job: Job) -> Environment:
    on_gpu = job.config.launcher.accelerator == "gpu"
    return environment(
        device=torch.cuda.get_device_name() if on_gpu else None,
        device_count=job.world_size if on_gpu else 1,
    )


def record_of(
    job: Job,
    run_id: str,
    results: record.Results,
    size: record.Stats,
    dtypes: Mapping[str, str],
    order: str | None,
    *,
    found: Found | None,
    environment: Environment,
) -> RunRecord:
    """The run's record; the formats and the batch in it are those that were found in use."""
    config = job.config
    formats = vars(config.precision) | dict(dtypes)
    if found is not None:
        formats |= {"parameter": found.parameter, "master": " and ".join(found.masters) or formats["master"]}
        if not config.precision.autocasts:
            formats["compute"] = found.parameter
    return RunRecord(
        run_id=run_id,
        name=config.name,
        group=config.logger.group,
        strategy=config.strategy["name"],
        model=str(config.choices.get("model")),
        data=str(config.choices.get("data")),
        seed=config.seed,
        config=redact(config.model_dump()),  # records are shared
        config_hash=config.hash,
        environment=environment,
        world_size=job.world_size,
        mesh=record.Mesh(**job.mesh.sizes),
        precision=record.Precision(**formats),
        model_stats=size,
        batch=record.Batch(
            global_=(found and found.global_batch) or job.data.global_batch_size,
            micro=(found and found.micro_batch) or job.data.micro_batch_size,
            accumulation=job.accumulation,
            tokens_per_sample=job.data.tokens_per_sample,
            order=order,
        ),
        found=found,
        results=results,
    )
