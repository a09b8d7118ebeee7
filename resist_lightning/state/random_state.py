"""Saves, restores and seeds the global random generators of a process: torch, its GPU, NumPy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
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
    before = _generators()
    try:
        yield
    finally:
        _set_generators(before)


class RandomStream:
    """A stream of random numbers that a part of a program draws, beside the numbers that the rest draws.

    It begins at its first use, from the state of the generators then.

    Args:
        key: distinguishes streams that begin from one state.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._state: tuple[Any, ...] | None = None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, all generators give the numbers of this stream. Fast enough for every batch."""
        with random_numbers_apart():
            if self._state is None:
                seed_generators(self._first_seed())
            else:
                _set_generators(self._state)
            yield
            self._state = _generators()

    def state_dict(self) -> Randomness:
        """The state of the stream; empty before its first use."""
        if self._state is None:
            return {}
        with random_numbers_apart():
            _set_generators(self._state)
            return random_state()

    def load_state_dict(self, state: Randomness) -> None:
        """Resume from a :meth:`state_dict`."""
        if state:
            with random_numbers_apart():
                set_random_state(state)
                self._state = _generators()

    def _first_seed(self) -> int:
        digest = blake2b(self._key.encode(), digest_size=8)
        digest.update(torch.get_rng_state().numpy().tobytes())
        return int.from_bytes(digest.digest(), "big")


def _generators() -> tuple[Any, ...]:
    """The state of all generators, each in its own form; :func:`random_state` makes lists, which is slow."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), torch.get_rng_state(), cuda, np.random.get_state()


def _set_generators(state: tuple[Any, ...]) -> None:
    python, torch_cpu, cuda, numpy = state
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
