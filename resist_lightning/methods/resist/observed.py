"""Bytes of each part of a network in the assembly of its full model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from resist_lightning.comm.packing import packed_bytes
from resist_lightning.comm.tensors import averaged_bytes_by_type
from resist_lightning.methods.resist.bytes import Observed
from resist_lightning.state.batch_norm import norms_with_statistics

if TYPE_CHECKING:  # which shows an overview with it
    from resist_lightning.methods.resist.layout import BlockLayout


def observed(layout: BlockLayout) -> Observed:
    """The bytes of a layout's parts in the assembly of the full model."""
    changing = layout.changing()

    def those(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensor for name, tensor in tensors.items() if name in changing]

    blocks = [those(block.tensors()) for block in layout.blocks]
    return Observed(
        shared=tuple(averaged_bytes_by_type(those(part)) for part in layout.fragments.parts(layout.shared)),
        shared_packed=packed_bytes(those(layout.shared)),
        blocks=tuple(packed_bytes(block.tensors().values()) for block in layout.blocks),
        averaged=tuple(map(averaged_bytes_by_type, blocks)),
        averaged_packed=tuple(map(packed_bytes, blocks)),
        norms=averaged_bytes_by_type(_estimated(layout)),
    )


def _estimated(layout: BlockLayout) -> list[Tensor]:
    """The batch-norm statistics that are re-estimated for the full model."""
    if layout.config.batch_norm != "recalibrate" or not layout.partial:
        return []
    found: list[Tensor] = []
    for norm in norms_with_statistics(layout.module).values():
        found += [buffer for name, buffer in norm.named_buffers(recurse=False) if name != "num_batches_tracked"]
    return found
