"""Finds frozen tensors that the program writes by itself, such as the weights of a moving-average teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from resist_lightning.checks.hashing import SAMPLED_SHARE, Hasher, as_numbers
from resist_lightning.methods.layout import Layout
from resist_lightning.state.own_tensors import version


@dataclass(frozen=True)
class _Mark:
    version: int
    sampled: float
    whole: float


class FrozenTensors:
    """The parameters that all workers hold and no average includes, because they do not train.

    Args:
        layout: the model's parts.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sampled, self._whole = Hasher(SAMPLED_SHARE), Hasher(1)
        self._marks: dict[str, _Mark] = {}

    def note(self) -> None:
        """Remember the values of those that have become frozen. Call it where all workers have equal ones."""
        frozen = self._layout.shared.keys() - self._layout.changing()
        self._marks = {name: mark for name, mark in self._marks.items() if name in frozen}
        new = {name: tensor for name, tensor in self._layout.shared.items() if name in frozen - self._marks.keys()}
        if self._layout.workers > 1 and new:
            numbers = zip(_hashes(self._sampled, new.values()), _hashes(self._whole, new.values()), strict=True)
            for (name, tensor), (sampled, whole) in zip(new.items(), numbers, strict=True):
                self._marks[name] = _Mark(version(tensor), sampled, whole)

    def written(self) -> list[str]:
        """Names of those whose values differ from the noted ones.

        Looks at a sample of the entries, and at all where torch has counted a write: writes through ``.data`` are not
        counted.
        """
        if self._layout.companion is not None and self._layout.companion.shown:
            return []  # the module has a copy's values for now
        frozen = self._layout.shared.keys() - self._layout.changing()
        now = {name: self._layout.shared[name] for name in self._marks if name in frozen}
        sampled = dict(zip(now, _hashes(self._sampled, now.values()), strict=True))
        doubtful = {n: t for n, t in now.items() if sampled[n] != self._marks[n].sampled or self._counted(n, t)}
        whole = dict(zip(doubtful, _hashes(self._whole, doubtful.values()), strict=True))
        return sorted(name for name, number in whole.items() if number != self._marks[name].whole)

    def _counted(self, name: str, tensor: Tensor) -> bool:
        return version(tensor) != self._marks[name].version


def _hashes(hasher: Hasher, tensors: Iterable[Tensor]) -> list[float]:
    hashes = hasher.hashes(tensors, 0)
    return as_numbers(hashes) if hashes else []
