"""The global random generators of a process: torch, its GPU, NumPy and Python."""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import torch

try:
    import numpy as np
except ImportError:  # torch and Lightning work without it
    np = None  # type: ignore[assignment]

Randomness: TypeAlias = dict[str, Any]


def random_state() -> Randomness:
    """The state of all generators, as tensors, lists and numbers."""
    version, words, gauss = random.getstate()
    state: Randomness = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if np is not None:
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
    if "numpy" in state and np is not None:
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
