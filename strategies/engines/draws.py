"""What is drawn at random: by which seeds, so that ranks that see other samples draw other numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def seed_of(*place: object) -> int:
    """A 32-bit seed for a place in a run: the run's seed, a step, a micro-batch."""
    return int.from_bytes(blake2b(repr(place).encode(), digest_size=4).digest(), "big")


def generators_of(device: torch.device) -> list[torch.Generator]:
    """Those that draw on the CPU and on this device."""
    of_device = [torch.cuda.default_generators[torch.cuda.current_device()]] if device.type == "cuda" else []
    return [torch.default_generator, *of_device]


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and this device, numpy's and Python's.

    `torch.manual_seed` is not called: for each kind of device that is absent, it writes down its caller's stack.
    """
    for generator in generators_of(device):
        generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def draws_of(seed: int, device: torch.device) -> Iterator[None]:
    """As `seed_draws`, with all of it put back at the end."""
    with left_alone(device):
        seed_draws(seed, device)
        yield


@contextmanager
def left_alone(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the next draw behind it is as if nothing had been."""
    generators = generators_of(device)
    states = [generator.get_state() for generator in generators]
    states_besides = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(states_besides[0])
        random.setstate(states_besides[1])
