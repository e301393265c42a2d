"""Draws that depend on given numbers alone, whatever was drawn before and whichever process draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["random_states_kept", "seed_generators", "seed_of"]


def seed_of(*numbers: int) -> int:
    """Return a seed of 63 bits that is fixed by `numbers`, none of them negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_generators(seed: int) -> None:
    """Seed what augmentation draws from: the generators of Python, of NumPy and of torch on the CPU.

    Not `torch.manual_seed`, which would seed those of all devices too, and dropout draws from them.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give the generators of Python, of NumPy and of torch on the CPU the states back that they had."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
