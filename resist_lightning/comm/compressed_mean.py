"""Averages tensors over the workers in few bits, by their changes since they were last equal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.feedback import Feedback
from resist_lightning.comm.mean_of_changes import MeanOfChanges
from resist_lightning.comm.quantize import Quantizer, arrange, is_vector


class CompressedMean:
    """Tensors that are equal on all workers when a round begins, and are averaged when it ends.

    Vectors have a message of their own where their format differs from that of matrices.
    """

    def __init__(self, collective: Collective, wire: Quantizer) -> None:
        self._collective = collective
        self._matrices = MeanOfChanges(collective, wire)
        self._vectors = MeanOfChanges(collective, wire.for_vectors) if wire.for_vectors is not None else None
        self._before: dict[int, Tensor] = {}
        self._feedback = Feedback() if wire.format.feedback else None

    def begin(
        self,
        tensors: Iterable[Tensor],
        copies: Mapping[int, Tensor] = MappingProxyType({}),
        kept: Collection[int] = (),
    ) -> None:
        """Remember the values of tensors, which are equal on all workers now; this costs a copy of them.

        Args:
            tensors: of the module.
            copies: by identity, tensors to remember instead of a new copy.
            kept: by identity, tensors whose earlier values stay remembered; all others are forgotten.
        """
        earlier = self._before
        self._before = {key: earlier[key] for key in earlier if key in kept}
        for tensor in tensors:
            key = id(tensor)
            self._before[key] = copies[key] if key in copies else _copied(tensor.detach(), earlier.pop(key, None))

    def state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By name, the values at the beginning of the round and the rounding errors; on the CPU."""
        state: dict[str, dict[str, Tensor]] = {"before": {}}
        if self._feedback is not None:
            state["taken"] = {}
        for name, tensor in tensors.items():
            before, taken = self.before(tensor), self.taken(tensor)
            if before is not None:
                state["before"][name] = before.cpu()
            if taken is not None:
                state["taken"][name] = taken.cpu().clone()  # a piece of a larger buffer, which would be saved whole
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
        """Restore a :meth:`state_dict`, and forget all else. A state of another format has no rounding errors."""
        before = state["before"].items()
        self._before = {id(tensors[name]): value.to(tensors[name].device, copy=True) for name, value in before}
        if self._feedback is not None:
            taken = state.get("taken", {}).items()
            self._feedback.load((tensors[name], value.to(tensors[name].device, copy=True)) for name, value in taken)

    def taken(self, tensor: Tensor) -> Tensor | None:
        """Rounding errors to be added to a tensor's next change, flat; None if there are none."""
        return self._feedback.of(tensor) if self._feedback is not None else None

    def before(self, tensor: Tensor) -> Tensor | None:
        """A tensor's value when the round began; None if it is not remembered."""
        return self._before.get(id(tensor))

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor's value is remembered."""
        return id(tensor) in self._before

    def average(
        self,
        tensors: Sequence[Tensor],
        kind: str,
        left_out: Sequence[int] = (),
        copies: Sequence[Tensor] | None = None,
        kept: Collection[int] = (),
    ) -> None:
        """Replace tensors of :meth:`begin` by their remembered values plus the mean change.

        Collective: every worker must call this, in the same order, with the same tensors.

        Args:
            tensors: of the module.
            kind: how the bytes are counted.
            left_out: workers that take part, but whose changes do not count.
            copies: of the tensors, which are averaged in their place.
            kept: by identity, tensors of other messages, whose rounding errors are kept.
        """
        tensors = arrange(tensors)
        if not tensors or self._collective.workers == 1:
            return
        values = tensors if copies is None else arrange(copies)
        # Matrices come first.
        apart = sum(map(is_vector, tensors)) if self._vectors is not None else 0
        border = len(tensors) - apart
        self._average(self._matrices, tensors[:border], values[:border], kind, left_out, kept)
        if self._vectors is not None:
            self._average(self._vectors, tensors[border:], values[border:], kind, left_out, kept)

    def _average(
        self,
        mean: MeanOfChanges,
        tensors: Sequence[Tensor],
        values: Sequence[Tensor],
        kind: str,
        left_out: Sequence[int],
        kept: Collection[int],
    ) -> None:
        """Average the tensors of one message."""
        if not any(tensor.numel() for tensor in tensors):
            return
        values = [value.detach() for value in values]
        before = [self._before[id(tensor)].reshape(-1) for tensor in tensors]
        # Views, except of the few tensors whose entries are not in order in memory.
        flats = [value.reshape(-1) for value in values]
        taken = self._feedback.flat(tensors, kept) if self._feedback is not None and mean.feedback else None
        mean.apply(flats, before, kind, left_out, taken)
        for value, flat in zip(values, flats, strict=True):
            if value.data_ptr() != flat.data_ptr():
                value.copy_(flat.view(value.shape))


def _copied(tensor: Tensor, copy: Tensor | None) -> Tensor:
    """A copy of a tensor, in the memory of an earlier one where it fits: new memory costs as much as the copy."""
    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype or copy.device != tensor.device:
        return tensor.clone()
    return copy.copy_(tensor)
