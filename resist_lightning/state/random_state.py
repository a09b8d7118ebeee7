"""Saves, restores and seeds the global random generators of a process: torch, its GPU, NumPy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

Randomness: TypeAlias = dict[str, Any]


def random_state() -> Randomness:
    """The state of all generators, as tensors, lists and numbers."""
    version, words, gauss = random.getstate()
    state: Randomness = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)
    state["numpy"] = [name, torch.from_numpy(np.asarray(keys).astype("int64")), *rest]
    return state


def set_random_state(state: Randomness) -> None:
    """Put all generators into a state of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), *rest))


@contextmanager
def random_numbers_apart() -> Iterator[None]:
    """Inside, drawing and seeding leave no trace in the generators. Fast enough for every batch."""
    # Not by `random_state`, which makes lists of Python's and NumPy's words.
    python, torch_cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    numpy = np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        np.random.set_state(numpy)


def seed_generators(seed: int) -> None:
    """Seed all generators by a number of 64 bits; a GPU's only where one is in use."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs that are not in use, too
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    # One word more than Python's seed: both generators have the same algorithm, and must not draw the same.
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32, 1])
