"""The reference simulator's mean in fewer bits, of parameters that all workers hold, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from resist_lightning.comm.quantize import Quantizer, compressible, is_vector
from resist_lightning.methods.simulation import flat_of, pieces_of


class SimulatedMean:
    """The mean of parameters whose changes are sent in few bits.

    Args:
        wire: encoding of the numbers.
        workers: number of simulated workers.
    """

    def __init__(self, wire: Quantizer, workers: int) -> None:
        self._wire = wire
        self._before: dict[str, Tensor] = {}
        self._taken: list[dict[str, Tensor]] = [{} for _ in range(workers)]  # by rounding, from each worker

    def begin_round(self, agreed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Note the values from which changes count.

        Args:
            agreed: values that are equal on all workers, by name; notes of other names stay.
            tensors: tensors of a worker; those frozen now are not noted, and so are sent exactly if they train later.
        """
        others = {name: value for name, value in self._before.items() if name not in agreed}
        trained = {name: value for name, value in agreed.items() if compressible(tensors[name])}
        self._before = {**others, **trained}

    def of(
        self, names: Iterable[str], copies: Sequence[Mapping[str, Tensor]], kept: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The noted values plus the mean of the workers' compressed changes, which is compressed itself.

        Args:
            names: names in the order of the message; those that are not compressed, or were not noted, are left out.
            copies: each worker's tensors now.
            kept: names of parameters in other fragments, whose rounding errors are kept.
        """
        before = {n: self._before[n] for n in names if n in self._before and compressible(copies[0][n])}
        vectors = self._wire.for_vectors
        if vectors is None:
            return self._of(self._wire, before, copies, kept)
        small = {name: value for name, value in before.items() if is_vector(value)}
        large = {name: value for name, value in before.items() if name not in small}
        return {**self._of(self._wire, large, copies, kept), **self._of(vectors, small, copies, kept)}

    def _of(
        self,
        wire: Quantizer,
        before: Mapping[str, Tensor],
        copies: Sequence[Mapping[str, Tensor]],
        kept: Collection[str],
    ) -> dict[str, Tensor]:
        """The result of :meth:`of` for parameters that travel in one message."""
        if not before:
            return {}
        changes = [flat_of({name: copy[name] - value for name, value in before.items()}) for copy in copies]
        if wire.format.feedback:
            mean = self._with_feedback(changes, before, kept)
        else:
            sent = [wire.through(change) for change in changes]
            mean = wire.through(sum(sent[1:], sent[0]) / len(sent))
        return {name: before[name] + change for name, change in pieces_of(mean, before).items()}

    def _with_feedback(self, changes: list[Tensor], before: Mapping[str, Tensor], kept: Collection[str]) -> Tensor:
        """The mean of changes, to each of which its worker adds its earlier rounding error."""
        owed, sent = [], []
        for taken, change in zip(self._taken, changes, strict=True):
            zeros = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in before.items()}
            wanted = change + flat_of({name: taken.get(name, zeros[name]) for name in before})
            sent.append(self._wire.through(wanted))
            owed.append(wanted - sent[-1])
        means, form = [], self._wire.format
        for worker, own in enumerate(owed):  # each averages a share of the groups for all
            share = slice(*(form.group * group for group in form.share(len(own), worker, len(owed))))
            mean = (sum((each[share] for each in sent[1:]), sent[0][share]) + own[share]) / len(owed)
            means.append(self._wire.through(mean))
            own[share] = (mean - means[-1]) * len(owed)
        for worker, own in enumerate(owed):
            others = {name: piece for name, piece in self._taken[worker].items() if name in kept}
            self._taken[worker] = others | {name: piece.clone() for name, piece in pieces_of(own, before).items()}
        return torch.cat(means)
