"""Finds frozen tensors that the program writes by itself, such as the weights of a moving-average teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from resist_lightning.checks.hashing import SAMPLED_SHARE, Hasher, as_numbers
from resist_lightning.methods.layout import Layout
from resist_lightning.state.own_tensors import version


@dataclass(frozen=True)
class _Mark:
    """The state of a noted tensor: torch's count of writes, and hashes of a sample and of all entries."""

    version: int
    sampled: float
    whole: float


class FrozenTensors:
    """The parameters that all workers hold and no average includes, because they do not train."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sampled, self._whole = Hasher(SAMPLED_SHARE), Hasher(1)
        self._marks: dict[str, _Mark] = {}

    def note(self, unsettled: Collection[str] = ()) -> None:
        """Remember the values of newly frozen tensors that all workers have alike.

        Args:
            unsettled: names of tensors that workers do not have alike yet.
        """
        if self._layout.workers == 1:
            return
        frozen = {name: tensor for name, tensor in self._frozen().items() if name not in unsettled}
        # A tensor that has trained meanwhile, or is averaged since it was written, has other values now.
        self._marks = {name: mark for name, mark in self._marks.items() if name in frozen}
        new = {name: tensor for name, tensor in frozen.items() if name not in self._marks}
        sampled, whole = _hashes(self._sampled, new), _hashes(self._whole, new)
        for name, tensor in new.items():
            self._marks[name] = _Mark(version(tensor), sampled[name], whole[name])

    def written(self) -> list[str]:
        """Names of tensors whose values have changed since :meth:`note`.

        Hashes a sample of the entries, and all of them where the sample differs or torch has counted a write: writes
        through ``.data`` are not counted.
        """
        companion = self._layout.companion
        if companion is not None and companion.shown:
            return []  # the module has a copy's values for now
        marked = {name: tensor for name, tensor in self._frozen().items() if name in self._marks}
        sampled = _hashes(self._sampled, marked)
        doubtful = {}
        for name, tensor in marked.items():
            mark = self._marks[name]
            if sampled[name] != mark.sampled or version(tensor) != mark.version:
                doubtful[name] = tensor
        # A write may have left the values unchanged.
        whole = _hashes(self._whole, doubtful)
        return sorted(name for name, number in whole.items() if number != self._marks[name].whole)

    def _frozen(self) -> dict[str, Tensor]:
        changing = self._layout.changing()
        return {name: tensor for name, tensor in self._layout.shared.items() if name not in changing}


def _hashes(hasher: Hasher, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    numbers = as_numbers(hasher.hashes(tensors.values()))
    return dict(zip(tensors, numbers, strict=True))
