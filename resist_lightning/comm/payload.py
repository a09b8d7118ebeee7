"""A block's payload in a message, and the kind under which its bytes are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_lightning.comm.quantize import arrange


@dataclass(frozen=True)
class Payload:
    """The payload of a block, or of its velocity. Tensors of an absent block are on the meta device.

    Args:
        block: its parameters and buffers, except compressed ones.
        state: its optimizer state, if that travels.
        compressed: parameters that travel in fewer bits.
        noise: the random generator for rounding these.
        kind: under which the block's bytes are counted; "" for that of the operation.
    """

    block: Sequence[Tensor]
    state: Sequence[Tensor] = ()
    compressed: Sequence[Tensor] = ()
    noise: torch.Generator | None = None
    kind: str = ""

    @property
    def plain(self) -> list[Tensor]:
        """The uncompressed tensors, in the order of the message."""
        return [*self.block, *self.state]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the message."""
        return [*self.plain, *arrange(self.compressed)]

    @property
    def entries(self) -> int:
        """Number of compressed entries."""
        return sum(tensor.numel() for tensor in self.compressed)
