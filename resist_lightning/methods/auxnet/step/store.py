"""Stores guesses and multipliers by sample, for the methods without auxiliary networks.

A sample is identified by its content, so a loader need not give its index; but a sample that is augmented anew in
each epoch is never seen twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Samples:
    """A batch of images whose names are computed once, and only on demand."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.detach()

    @cached_property
    def names(self) -> list[bytes]:
        """A name for each sample."""
        return contents(self.images)


def contents(x: Tensor) -> list[bytes]:
    """A name for each sample of a batch (batch, ...): a hash of its values."""
    rows = x.detach().cpu().contiguous().flatten(1)
    names = []
    for row in rows.view(torch.uint8).numpy():
        # Short, as a store has one for each sample; 16 bytes do not collide.
        digest = hashlib.blake2b(row.tobytes(), digest_size=16)
        names.append(digest.digest())
    return names


class SeenSamples:
    """The samples that have been seen, the same on every worker."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()
        self._misses = 0  # batches in a row without a known sample

    def add(self, x: Samples) -> None:
        """Add samples that have been seen."""
        self._names.update(x.names)

    def lacks(self, x: Samples, epoch_batches: int) -> bool:
        """Whether a sample of a batch has not been seen.

        Raises:
            ValueError: if none was seen in more batches than an epoch has: every step would be serial.
        """
        self._misses = 0 if self._names.intersection(x.names) else self._misses + 1
        if self._misses > epoch_batches:
            raise ValueError(
                f"guesses are stored by sample, but no sample of {self._misses} batches, more than an epoch has, was "
                "seen before: augmentation changes the samples each time. Take random transforms out of the collate "
                "function and the training_step (those of the data set are frozen), or use method='penalty' or "
                "'al-net'."
            )
        return not self._names.issuperset(x.names)

    def state_dict(self) -> dict[str, Any]:
        """The names as text."""
        return {"misses": self._misses, "seen": sorted(name.hex() for name in self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state that contains a :meth:`state_dict`."""
        self._misses = state["misses"]
        self._names = {bytes.fromhex(name) for name in state["seen"]}


class SampleStore:
    """The last guess, and multiplier if there are any, of each sample; on the CPU."""

    def __init__(self, *, multipliers: bool) -> None:
        self._multipliers = multipliers
        self._rows: dict[bytes, Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all rows, without their names."""
        return sum(row.nbytes for row in self._rows.values())

    def get(self, names: Sequence[bytes], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Guesses and multipliers of known samples, (batch, ...) each."""
        rows = [self._rows[name] for name in names]
        # The guesses first, then the multipliers.
        values = torch.stack(rows, dim=1).to(device)
        return values[0], values[1] if self._multipliers else None

    def put(self, names: Sequence[bytes], guess: Tensor, multiplier: Tensor | None) -> None:
        """Store the guesses of a batch, by sample; for a sample that is in it twice, the last."""
        parts = [guess.detach().cpu()]
        if multiplier is not None:
            parts.append(multiplier.detach().cpu())
        rows = torch.stack(parts, dim=1)
        for name, row in zip(names, rows, strict=True):
            # A view would keep the rows of the whole batch.
            self._rows[name] = row.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Names (samples, 16) and values (samples, 1 or 2, ...), as tensors."""
        if not self._rows:
            return {}
        joined = bytearray(b"".join(self._rows))
        names = torch.frombuffer(joined, dtype=torch.uint8).view(-1, 16)
        return {"names": names, "values": torch.stack(list(self._rows.values()))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from a :meth:`state_dict`."""
        self._rows = {}
        if not state:
            return
        for name, row in zip(state["names"], state["values"], strict=True):
            self._rows[bytes(name.tolist())] = row.clone()
