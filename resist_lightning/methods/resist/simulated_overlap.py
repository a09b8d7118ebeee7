"""A sync of the reference simulator that is under way: what was sent at its border, and how it is applied later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resist_lightning.comm.tensors import is_continuous
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.transfers import SyncPlan


@dataclass(frozen=True)
class SimulatedTransit:
    """A sync between its border and the end of its round.

    Args:
        before: the partition of the round that ends.
        after: the partition of the next one.
        plan: from the one to the other.
        values: what the sync gives, by name, of all that it covers.
        momenta: optimizer state of the blocks at the border.
        own: for each worker, what it had at the border, by name; None if the training waited for the sync.
        block_of: the block of each tensor that is not shared, by name.
    """

    before: Partition
    after: Partition
    plan: SyncPlan
    values: Mapping[str, Tensor]
    momenta: dict[tuple[int, str, str], Any]
    own: list[dict[str, Tensor]] | None
    block_of: Mapping[str, int]

    def apply(self, worker: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a worker what the sync has brought; what it has learned since the border stays, where it stays."""
        moved = {transfer.block for transfer in (*self.plan.merge, *self.plan.hand_over)}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in self.values:  # in another fragment
                    continue
                block = self.block_of.get(name)
                # Absent blocks too, which costs nothing here: only held ones are trained.
                arrives = block is not None and block not in self._stays(worker)
                if self.own is None or arrives:
                    tensor.copy_(self.values[name])
                elif isinstance(tensor, nn.Parameter) and is_continuous(tensor.dtype):
                    wide = torch.promote_types(tensor.dtype, torch.float32)
                    change = self.values[name].to(wide) - self.own[worker][name].to(wide)
                    tensor.copy_(tensor.to(wide) + change)
                elif block is None or block in moved or block in self.plan.averaged:
                    # A variance that is shifted may become negative; the mean of variances cannot.
                    tensor.copy_(self.values[name])

    def _stays(self, worker: int) -> set[int]:
        return set(self.before.held[worker]) & set(self.after.held[worker])
