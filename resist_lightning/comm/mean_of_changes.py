"""Averages the workers' changes, in messages of few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.packing import cut
from resist_lightning.comm.quantize import Quantizer, piece_entries


class MeanOfChanges:
    """The mean of the changes of tensors that were equal on all workers.

    Every worker averages an equal share of the entries for all: first each sends the others their shares of its change,
    then each sends the mean of its own share to all. All apply the values as sent, so that all workers end with the
    same, bit for bit.

    With error feedback, a worker adds earlier rounding errors: those of its own changes, in shares that others average;
    and those of the mean, times the number of workers, in the share that it averages for all.

    Attributes:
        feedback: whether the format has error feedback.
    """

    def __init__(self, collective: Collective, wire: Quantizer) -> None:
        self.feedback = wire.format.feedback
        self._collective = collective
        self._wire = wire

    def apply(
        self,
        values: Sequence[Tensor],
        before: Sequence[Tensor],
        kind: str,
        left_out: Sequence[int] = (),
        taken: Tensor | None = None,
    ) -> None:
        """Replace values by the earlier ones plus the mean change.

        Collective: every worker must call this, in the same order, with tensors of the same sizes.

        Args:
            values: flat.
            before: flat, in the same order; equal on all workers.
            kind: how the bytes are counted.
            left_out: workers that take part, but whose changes do not count.
            taken: rounding errors of all entries in order, replaced by the new ones; None without error feedback.
        """
        counts = self._collective.worker not in left_out
        change = self._encoded_change(values, before, taken if counts else None, counts=counts)
        entries = sum(map(len, before))
        mean = self._mean(change, entries, kind, self._collective.workers - len(left_out), taken)
        self._add(mean, values, before)

    def _encoded_change(
        self, values: Sequence[Tensor], before: Sequence[Tensor], taken: Tensor | None, *, counts: bool
    ) -> Tensor:
        """The encoded own change, a row for each group."""
        entries = sum(map(len, before))
        form, device = self._wire.format, before[0].device
        message = torch.empty(form.groups(entries), form.group_bytes, dtype=torch.uint8, device=device)
        change = torch.zeros(min(entries, piece_entries(device)), dtype=torch.float32, device=device)
        done = 0
        for rows, places in self._pieces(message, values):
            size = 0
            for index, first, last in places:
                target = change[size : size + last - first]
                if counts:
                    torch.sub(values[index][first:last], before[index][first:last], out=target)
                size += last - first
            if taken is None:
                self._wire.encode_into(rows, change[:size])
            else:
                remainder = taken[done : done + size]
                self._encode_with_rest(rows, remainder.add_(change[:size]), remainder)
            done += size
        return message

    def _encode_with_rest(self, rows: Tensor, values: Tensor, rest: Tensor) -> None:
        """Encode values, and write their rounding errors into ``rest``, which may be the values themselves."""
        self._wire.encode_into(rows, values)
        torch.sub(values, self._decode(rows, len(values)), out=rest)

    def _mean(self, message: Tensor, entries: int, kind: str, counted: int, taken: Tensor | None) -> Tensor:
        """The encoded mean: the sum of all workers' changes divided by the number of those that count."""
        me, workers = self._collective.worker, self._collective.workers
        peers = [worker for worker in range(workers) if worker != me]
        # Shares are whole groups, so that a group's scale always travels with its entries.
        form = self._wire.format
        shares = [slice(*form.share(len(message) * form.group, worker, workers)) for worker in range(workers)]

        # First the others' shares to them, and their parts of the own share here.
        own_part = message[shares[me]]
        sends = {peer: message[shares[peer]] for peer in peers}
        parts = {peer: torch.empty_like(own_part) for peer in peers}
        self._exchange(sends, parts, kind)
        parts[me] = own_part
        # Then the mean of the own share to all, and the others' means here.
        result = torch.empty_like(message)
        means = {worker: result[shares[worker]] for worker in range(workers)}
        own_mean = means.pop(me)
        # Without the padding of the last group, which would count in its scale.
        first, last = (min(group * form.group, entries) for group in (shares[me].start, shares[me].stop))
        own_taken = taken[first:last] if taken is not None else None
        self._average(own_mean, [parts[worker] for worker in range(workers)], last - first, counted, own_taken)
        self._exchange(dict.fromkeys(peers, own_mean), means, kind)
        # The own mean is decoded as well: all apply the values as sent, rounding included.
        return result

    def _average(self, mean: Tensor, parts: Sequence[Tensor], entries: int, counted: int, taken: Tensor | None) -> None:
        """Encode into ``mean`` the mean of the workers' encoded ``parts``, each of so many entries."""
        piece = piece_entries(mean.device) // self._wire.format.group
        done = 0
        for rows, *others in zip(mean.split(piece), *(part.split(piece) for part in parts), strict=True):
            # In the order of workers, so that the sum does not depend on whose share it is.
            size = min(len(rows) * self._wire.format.group, entries - done)
            total = self._decode(others[0], size)
            for other in others[1:]:
                total += self._decode(other, size)
            if taken is None:
                self._wire.encode_into(rows, total.div_(counted))
            else:
                # Makes the own change exact, as it need not be sent; and the error of this mean is for the next one.
                rest = taken[done : done + size]
                self._encode_with_rest(rows, total.add_(rest).div_(counted), rest)
                rest.mul_(self._collective.workers)
            done += size

    def _add(self, mean: Tensor, values: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Set the values to the earlier ones plus the mean change."""
        for rows, places in self._pieces(mean, values):
            change, size = self._decode(rows), 0
            for index, first, last in places:
                old = before[index][first:last]
                own_change = change[size : size + last - first].to(old.dtype)
                torch.add(old, own_change, out=values[index][first:last])
                size += last - first

    def _pieces(self, message: Tensor, flats: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[tuple[int, int, int]]]]:
        """Groups of rows of a message, each with the parts of flat tensors in them, by :func:`cut`."""
        piece = piece_entries(message.device)
        return zip(message.split(piece // self._wire.format.group), cut(map(len, flats), piece), strict=True)

    def _decode(self, rows: Tensor, entries: int | None = None) -> Tensor:
        entries = len(rows) * self._wire.format.group if entries is None else entries
        values = torch.empty(entries, dtype=torch.float32, device=rows.device)
        self._wire.decode_into(values, rows)
        return values

    def _exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor], kind: str) -> None:
        """Send and receive all rows that are not empty."""
        outgoing = {peer: [rows.view(-1)] for peer, rows in sends.items() if len(rows)}
        incoming = {peer: [rows.view(-1)] for peer, rows in receives.items() if len(rows)}
        sent_bytes = sum(flat.nbytes for (flat,) in outgoing.values())
        self._collective.exchange(outgoing, incoming, {kind: sent_bytes})
