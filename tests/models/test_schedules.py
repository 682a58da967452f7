"""Learning-rate schedules step by step."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from models.schedules import constant, cosine


def optimizer() -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def rates(scheduler: LambdaLR, num_steps: int) -> list[float]:
    """The rate that each optimizer step is taken at."""
    seen = []
    for _ in range(num_steps):
        seen.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_warm_up_is_linear_and_step_0_already_learns() -> None:
    assert rates(constant(optimizer(), warmup_steps=4), 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert rates(constant(optimizer(), warmup_steps=0), 2) == [2.0, 2.0]


def test_cosine_falls_from_the_full_rate_to_the_fraction_at_the_last_step() -> None:
    seen = rates(cosine(optimizer(), warmup_steps=2, max_steps=13, final_fraction=0.1), 15)
    assert seen[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert seen[7] == pytest.approx(1.1)  # half-way between 2.0 and 0.2
    assert seen[12:] == pytest.approx([0.2, 0.2, 0.2])
    assert seen[2:13] == sorted(seen[2:13], reverse=True)


def test_a_run_shorter_than_its_warm_up_ends_in_it() -> None:
    seen = rates(cosine(optimizer(), warmup_steps=8, max_steps=4, final_fraction=0.0), 4)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_wrong_number_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"^scheduler\.warmup_steps=-1 is negative; [^\n]+$"):
        constant(optimizer(), warmup_steps=-1)
    with pytest.raises(ValueError, match=r"^scheduler\.final_fraction=2 is no fraction; [^\n]+$"):
        cosine(optimizer(), warmup_steps=1, max_steps=4, final_fraction=2)
