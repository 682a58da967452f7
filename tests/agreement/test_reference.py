"""One process, which every strategy is compared with, computes what a loop of plain torch does."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from datamodules.loading import BatchDataset
from datamodules.order import Order
from datamodules.spec import SampledData
from launch.job import Job
from launch.worker import build_model
from strategies.engines.materialize import materialize
from tests.agreement.cases import STEPS, Case
from tests.agreement.training import job_of, train_case


def plain_loop(job: Job) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Losses and gradient norms by step, and the last weights."""
    data, config = cast(SampledData, job.data), job.config
    model: Any = build_model(config)
    model.configure_model()
    materialize(model, torch.device("cpu"), config.seed)
    model.double()
    made = model.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    samples = data.train_samples()
    order = Order(num_samples=len(samples), global_batch_size=data.global_batch_size, seed=data.seed)
    assert config.trainer.clip_norm is not None
    losses, norms = [], []
    for step in range(STEPS):
        loss = model.training_step(BatchDataset(samples)[order.step_indices(step)], 0)
        loss.backward()
        losses.append(loss.item())
        norms.append(clip_grad_norm_(model.parameters(), config.trainer.clip_norm).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses, norms, {fqn: weight.detach().numpy() for fqn, weight in model.named_parameters()}


def test_one_process_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    case = Case(strategy="single", world_size=1)
    found = train_case([*case.exact_overrides, "evidence=true"], tmp_path)
    losses, norms, weights = plain_loop(job_of(case.exact_overrides, tmp_path / "plain"))
    assert found.losses == pytest.approx(losses, rel=1e-12)
    assert [by_rank[0] for by_rank in found.gradient_norms] == pytest.approx(norms, rel=1e-12)
    assert found.weights[0].keys() == weights.keys()
    assert all(np.allclose(found.weights[0][fqn], weights[fqn], rtol=1e-9, atol=1e-12) for fqn in weights)
