"""The mean over the workers of tensors that travel in fewer bits: of what has changed since they were equal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.feedback import Feedback
from resist_lightning.comm.mean_of_changes import MeanOfChanges
from resist_lightning.comm.quantize import Quantizer, arrange, is_vector


class CompressedMean:
    """Tensors that are equal on all workers when a round begins, and become the mean of the workers' when it ends.

    Vectors have a message of their own where the format sends them in other numbers than matrices.
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
        """Remember tensors that are equal on all workers now; it costs a copy of them.

        Args:
            tensors: of the module.
            copies: by identity, what to remember in the place of a copy.
            kept: by identity, tensors of which is still remembered what was; all others are forgotten.
        """
        earlier = self._before
        self._before = {key: earlier[key] for key in earlier if key in kept}
        for tensor in tensors:
            key = id(tensor)
            self._before[key] = copies[key] if key in copies else _copied(tensor.detach(), earlier.pop(key, None))

    def state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By name, the values that differences are taken from, and what rounding has taken; on the CPU."""
        state: dict[str, dict[str, Tensor]] = {"before": {}}
        if self._feedback is not None:
            state["taken"] = {}
        for name, tensor in tensors.items():
            before, taken = self.before(tensor), self.taken(tensor)
            if before is not None:
                state["before"][name] = before.cpu()
            if taken is not None:
                state["taken"][name] = taken.cpu().clone()  # else with the memory of all of them
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
        """Remember what :meth:`state_dict` has told, of no other tensors. Other formats have taken nothing."""
        before = state["before"].items()
        self._before = {id(tensors[name]): value.to(tensors[name].device, copy=True) for name, value in before}
        if self._feedback is not None:
            taken = state.get("taken", {}).items()
            self._feedback.load((tensors[name], value.to(tensors[name].device, copy=True)) for name, value in taken)

    def taken(self, tensor: Tensor) -> Tensor | None:
        """What rounding has taken from a tensor, flat, if that will be added to its next change."""
        return self._feedback.of(tensor) if self._feedback is not None else None

    def before(self, tensor: Tensor) -> Tensor | None:
        """What a tensor was when the round began, if it was remembered."""
        return self._before.get(id(tensor))

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor was remembered."""
        return id(tensor) in self._before

    def average(
        self,
        tensors: Sequence[Tensor],
        kind: str,
        left_out: Sequence[int] = (),
        copies: Sequence[Tensor] | None = None,
        kept: Collection[int] = (),
    ) -> None:
        """Replace tensors that :meth:`begin` was given by what they were plus the mean change.

        Collective: every worker must call this, in the same order, with the same tensors.

        Args:
            tensors: of the module.
            kind: how the bytes are counted.
            left_out: workers that take part, but whose changes do not count.
            copies: of the tensors, which are averaged in their place.
            kept: by identity, tensors of other messages: what rounding has taken from these stays.
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
        """Average what travels in one message."""
        if not tensors:
            return
        values = [value.detach() for value in values]
        before = [self._before[id(tensor)].reshape(-1) for tensor in tensors]
        # Views, but for the few tensors whose entries do not lie in their order in memory.
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
