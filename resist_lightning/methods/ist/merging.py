"""Takes the mean over the holders of the entries of a divided tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece
from resist_lightning.schedule.partition import Partition


def write_means(
    part: Part, arrived: Sequence[tuple[Piece, Tensor]], held: Sequence[Partition], left_out: Collection[int]
) -> None:
    """Replace entries by the mean of their holders' values.

    Args:
        part: part of this worker, which owns or keeps the entries.
        arrived: each holder's values, this worker's own too, flat; all enter the same tensor of the part.
        held: the partitions of the round that ends.
        left_out: workers whose values count only where nobody else has any.
    """
    enters = arrived[0][0].enters
    own = part.tensor_of(enters)
    # With 16 bits, a sum would be rounded at every worker.
    wide = torch.promote_types(own.dtype, torch.float32)
    first, offset = (torch.zeros_like(own, dtype=wide) for _ in range(2))
    count = torch.zeros_like(own, dtype=torch.float32)
    firsts, offsets, counts = (replace(part, tensor=sums, store=sums) for sums in (first, offset, count))
    # In the same order everywhere, workers that are left out last.
    for piece, values in sorted(arrived, key=lambda sent: (sent[0].source in left_out, sent[0].source)):
        # Sums are read where the piece will be written, not where it came from.
        place = replace(piece, leaves=enters)
        sent, seen = values.to(own.device, wide), counts.take(place, held)
        is_first = seen == 0
        beginning = torch.where(is_first, sent, firsts.take(place, held))
        firsts.put(place, held, beginning)
        # The mean as an offset from the first value, so that values equal everywhere (frozen) stay as they are.
        difference = sent - beginning
        if piece.source in left_out:
            difference = difference.masked_fill(~is_first, 0)
        offsets.put(place, held, offsets.take(place, held) + difference)
        counts.put(place, held, seen + (is_first if piece.source in left_out else 1))
    mean = first + offset / count.clamp(min=1)
    own.copy_(torch.where(count > 0, mean.to(own.dtype), own))
