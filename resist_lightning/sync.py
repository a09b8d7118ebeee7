"""What a worker sends at a sync, and what it makes of what arrives (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resist_lightning.changes import Changes
from resist_lightning.collective import Collective, Finish
from resist_lightning.exchange import Cargo, Exchange, Kinds
from resist_lightning.layout import Layout
from resist_lightning.optimizer_state import OptimizerStates
from resist_lightning.plan import SyncPlan
from resist_lightning.timing import Seconds
from resist_lightning.wire import compressible, make_wire, noise_for


class Sync:
    """A worker's side of the syncs of a run.

    Args:
        layout: the model's parts and the settings.
        states: the optimizers' state.
        collective: the workers.
        device: where present tensors live.
        seconds: where the time of the parts is added up.
    """

    def __init__(
        self, layout: Layout, states: OptimizerStates, collective: Collective, device: torch.device, seconds: Seconds
    ) -> None:
        wire = make_wire(layout.config.wire)
        self.exchange = Exchange(collective, device, wire)
        self._layout = layout
        self._states = states
        self._worker = collective.worker
        self._device = device
        self._seconds = seconds
        self._changes = Changes(collective, wire) if wire is not None else None
        self._changing: set[str] = set()

    def begin(self) -> None:
        """Call it once, when training starts: shared tensors move together. Sends nothing."""
        if self._changes is None and self._layout.schedule.workers > 1:
            self.exchange.put_together(self.averaged(()))

    def end(self) -> None:
        """Call it once, when training has ended: every tensor gets memory of its own again."""
        self.exchange.take_apart()

    def begin_round(self, round: int) -> None:
        """Note what training can change now, and, to send changes only, what it was."""
        self._changing = self._layout.changing()
        if self._changes is not None:
            workers = self._layout.schedule.workers
            partition = self._layout.schedule.partition(round)
            everywhere = [b for b in range(len(self._layout.blocks)) if len(partition.holders(b)) == workers]
            self._changes.begin(filter(compressible, self.averaged(everywhere)))

    def start_average(self, plan: SyncPlan) -> Finish:
        """Begin to make shared tensors, and blocks that all workers keep, the mean over the workers.

        Collective: every worker must call this, in the same order.

        Returns:
            A function that waits for it; blocks may be handed over before, so that packing them costs no time of the
            link.
        """
        tensors = self.averaged(plan.averaged)
        with self._seconds.timed("averaging"):
            if self._changes is not None:
                known = [tensor for tensor in tensors if compressible(tensor) and self._changes.known(tensor)]
                taken = set(map(id, known))
                self._changes.average(known, "shared")
                tensors = [tensor for tensor in tensors if id(tensor) not in taken]
            finish = self.exchange.start_average(tensors, "shared")

        def finish_timed() -> None:
            with self._seconds.timed("averaging"):
                finish()

        return finish_timed

    def hand_over(self, plan: SyncPlan, round: int, make_room: Callable[[], None]) -> None:
        """Merge blocks that several workers held, and bring every block to its next holders.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.

        Args:
            plan: the plan of the sync.
            round: the round that ends.
            make_room: frees blocks that leave and allocates those that arrive.
        """

        def cargo(block: int) -> Cargo:
            return self.cargo(block, round=round)

        with self._seconds.timed("hand_over"):
            self.exchange.merge(plan, cargo, Kinds())
            self.exchange.hand_over(plan, cargo, Kinds(), make_room)

    def averaged(self, blocks: Sequence[int]) -> list[Tensor]:
        """Shared tensors, and the tensors of some blocks, that may have changed in this round."""
        names = self._changing | self._layout.changing()
        tensors = dict(self._layout.shared)
        for block in blocks:
            tensors.update(self._layout.blocks[block].tensors())
        return [tensor for name, tensor in tensors.items() if name in names]

    def cargo(self, index: int, *, round: int | None = None) -> Cargo:
        """What travels of a block: at the end of ``round``, or (None) to be looked at, exactly and without state."""
        block = self._layout.blocks[index]
        tensors = list(block.tensors().values())
        if round is None:
            return Cargo(tensors)
        config = self._layout.config
        state = self._states.tensors(block.module.parameters()) if config.momentum == "travel" else ()
        if self._changes is None:
            return Cargo(tensors, state)
        noise = noise_for(config.seed, round, index, self._worker, self._device)
        plain = [tensor for tensor in tensors if not compressible(tensor)]
        return Cargo(plain, state, [tensor for tensor in tensors if compressible(tensor)], noise)
