"""What is sent of a block in a message, and under which kind its bytes are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_lightning.comm.quantize import arrange


@dataclass(frozen=True)
class Payload:
    """What is sent of a block, or of a velocity of one. Tensors of an absent one are on the meta device.

    Args:
        block: its parameters and buffers, but for those that are compressed.
        state: its optimizer state, if that travels.
        compressed: parameters that travel in fewer bits.
        noise: random numbers for rounding these.
        kind: under which kind the block's bytes are counted; "" for that of the operation.
    """

    block: Sequence[Tensor]
    state: Sequence[Tensor] = ()
    compressed: Sequence[Tensor] = ()
    noise: torch.Generator | None = None
    kind: str = ""

    @property
    def plain(self) -> list[Tensor]:
        """What travels as it is, in the order of travel."""
        return [*self.block, *self.state]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, in the order of travel."""
        return [*self.plain, *arrange(self.compressed)]

    @property
    def entries(self) -> int:
        """Numbers that travel in fewer bits."""
        return sum(tensor.numel() for tensor in self.compressed)
