"""Temporarily makes worker 0's processes torch.distributed's default group, for work that the others do not join.

Metrics, callbacks and user code communicate over the default group. While worker 0 evaluates alone, that is a group of
its own processes, so that nobody waits for workers that are elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _world

from resist_lightning.comm.group import group_exists, group_timeout
from resist_lightning.comm.sockets import recording_group


class Apart:
    """Switches the default group to its first processes, and back.

    Collective: every process must make it, in the same order, when it has joined the default group.

    Args:
        processes: number of processes in the smaller group, counted from rank 0.

    Attributes:
        entered: whether this process communicates with these alone now.
    """

    def __init__(self, processes: int) -> None:
        self.entered = False
        self._whole: Any = None
        self._group: Any = None
        if not group_exists() or dist.get_world_size() == processes:
            return
        with recording_group(add=True):
            self._group = dist.new_group(list(range(processes)), timeout=group_timeout())
        if dist.get_rank() >= processes:
            self._group = None

    def enter(self) -> None:
        """Make the group of the first processes the default group; on all other processes nothing happens."""
        if self._group is not None and not self.entered:
            self._whole, self.entered = _get_default_group(), True
            _world.default_pg = self._group

    def leave(self) -> None:
        """Undo :meth:`enter`, if it was called."""
        if self.entered:
            _world.default_pg, self.entered = self._whole, False
            self._whole = None
