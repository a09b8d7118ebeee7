"""A sync of the reference simulator that is under way: values that have left, to be applied later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resist_lightning.comm.tensors import is_continuous, wide_dtype
from resist_lightning.methods.resist.simulated_momentum import Momenta
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.transfers import SyncPlan


@dataclass
class SimulatedTransit:
    """A sync between its border and the end of its round.

    Args:
        before: the partition of the round that ends.
        after: the partition of the next one.
        plan: the plan from one to the other.
        block_of: the block of each tensor that is not shared, by name.
        waits: whether the training waits for the sync.

    Attributes:
        values: results of the sync for the tensors that have left so far, by name.
        own: for each worker, its own values of these tensors when they left.
        momenta: optimizer state of the blocks when they left, if it travels.
        blocks_left: whether blocks have left.
    """

    before: Partition
    after: Partition
    plan: SyncPlan
    block_of: Mapping[str, int]
    waits: bool
    values: dict[str, Tensor] = field(default_factory=dict, init=False)
    own: list[dict[str, Tensor]] = field(default_factory=list, init=False)
    momenta: Momenta = field(default_factory=dict, init=False)
    blocks_left: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Make room for each worker's own values."""
        self.own = [{} for _ in self.before.held]

    def apply(self, worker: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a worker the results of the sync; parameters that stay keep their progress since they were sent."""
        moved = {transfer.block for transfer in (*self.plan.merge, *self.plan.hand_over)}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in self.values:  # in another fragment
                    continue
                block = self.block_of.get(name)
                # Absent blocks too, which costs nothing here: only held ones are trained.
                arrives = block is not None and block not in self._stays(worker)
                if self.waits or arrives:
                    tensor.copy_(self.values[name])
                elif isinstance(tensor, nn.Parameter) and is_continuous(tensor.dtype):
                    wide = wide_dtype(tensor.dtype)
                    change = self.values[name].to(wide) - self.own[worker][name].to(wide)
                    tensor.copy_(tensor.to(wide) + change)
                elif block is None or block in moved or block in self.plan.averaged:
                    # A variance that is shifted may become negative; the mean of variances cannot.
                    tensor.copy_(self.values[name])

    def _stays(self, worker: int) -> set[int]:
        return set(self.before.held[worker]) & set(self.after.held[worker])
