"""Random numbers that data are read with: of their own, so that neither training nor loading disturbs the other's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states


def seed_by(*place: object) -> None:
    """Seed the generators of the CPU by a place in the data: torch's, numpy's and Python's."""
    seed = int.from_bytes(blake2b(repr(place).encode(), digest_size=4).digest(), "big")
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def draws_apart() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the next draw behind it is as if nothing had been."""
    states = states_now()
    try:
        yield
    finally:
        _set_rng_states(states)


def states_now() -> dict[str, Any]:
    return _collect_rng_states(include_cuda=False)


class Generators:
    """Generators that go on from where they were left, each time that one is inside."""

    def __init__(self, *place: object) -> None:
        with draws_apart():
            seed_by(*place)
            self.states = states_now()

    @contextmanager
    def inside(self) -> Iterator[None]:
        with draws_apart():
            _set_rng_states(self.states)
            yield
            self.states = states_now()
