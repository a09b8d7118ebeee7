"""Lets the processes of worker 0 be torch.distributed's default group for a while: what the others do not take part in.

Metrics, callbacks and the user's code talk over the default group, whoever evaluates. While worker 0 evaluates alone
they find a group of its own processes, so that nobody waits for workers that are elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _world

from resist_lightning.comm.group import group_exists, group_timeout
from resist_lightning.comm.sockets import recording_group


class Apart:
    """The default group of the first processes, to enter and leave.

    Collective: every process must make it, in the same order, when it has joined the default group.

    Args:
        processes: how many of the default group, from the first on.

    Attributes:
        entered: whether this process talks to these alone now.
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
        """From now on the default group is that of the first processes; on all others nothing happens."""
        if self._group is not None and not self.entered:
            self._whole, self.entered = _get_default_group(), True
            _world.default_pg = self._group

    def leave(self) -> None:
        """Undo :meth:`enter`, if it was called."""
        if self.entered:
            _world.default_pg, self.entered = self._whole, False
            self._whole = None
