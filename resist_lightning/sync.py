"""What a worker sends at a sync, and what it makes of what arrives (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resist_lightning.changes import Changes
from resist_lightning.collective import Collective, Finish
from resist_lightning.exchange import Cargo, Exchange, Kinds
from resist_lightning.layout import Layout
from resist_lightning.optimizer_state import OptimizerStates
from resist_lightning.partition import Partition
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
        self._as_received: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Call it once, when training starts: shared tensors move together. Sends nothing."""
        if self._changes is None and self._layout.schedule.workers > 1:
            self.exchange.put_together(self.averaged(()).values())

    def end(self) -> None:
        """Call it once, when training has ended: every tensor gets memory of its own again."""
        self.exchange.take_apart()

    def begin_round(self, round: int) -> None:
        """Note what training can change now, and, where it will be needed, what it was."""
        self._changing = self._layout.changing()
        partition = self._layout.schedule.partition(round)
        if self._changes is not None:
            self._changes.begin(filter(compressible, self.equal(partition).values()))
        self._as_received = []  # never two copies at once
        if self._layout.config.non_finite == "drop":
            held = [self._layout.blocks[block] for block in partition.held[self._worker]]
            tensors = [tensor for block in held for tensor in block.tensors().values()]
            self._as_received = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def leave_out(self, plan: SyncPlan) -> None:
        """Where the plan leaves this worker out: give its blocks back the values that they had when the round began."""
        if self._worker in plan.left_out:
            for tensor, copy in self._as_received:
                tensor.detach().copy_(copy)

    def own(self) -> dict[str, Any]:
        """What this worker has noted of the round, for :meth:`load_own`."""
        before = {name: self._changes.before(tensor) for name, tensor in self._named().items()} if self._changes else {}
        received = {id(tensor): copy for tensor, copy in self._as_received}
        return {
            "changing": sorted(self._changing),
            "before": {name: tensor.cpu() for name, tensor in before.items() if tensor is not None},
            "received": {name: received[id(t)].cpu() for name, t in self._named().items() if id(t) in received},
        }

    def load_own(self, own: dict[str, Any]) -> None:
        """Go on in the middle of a round, after :meth:`begin_round`."""
        self._changing = set(own["changing"])
        tensors = self._named()
        received = {id(tensors[name]): copy for name, copy in own["received"].items()}
        for tensor, copy in self._as_received:
            copy.copy_(received.get(id(tensor), copy))
        if self._changes is not None:
            for name, before in own["before"].items():
                remembered = self._changes.before(tensors[name])
                assert remembered is not None
                remembered.copy_(before)

    def _named(self) -> dict[str, Tensor]:
        module = self._layout.module
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def start_average(self, plan: SyncPlan) -> Finish:
        """Begin to make shared tensors, and blocks that all workers keep, the mean over the workers.

        Collective: every worker must call this, in the same order.

        Returns:
            A function that waits for it; blocks may be handed over before, so that packing them costs no time of the
            link.
        """
        tensors = list(self.averaged(plan.averaged).values())
        self.leave_out(plan)
        if self._worker in plan.left_out:
            self._states.reset()
        with self._seconds.timed("averaging"):
            if self._changes is not None:
                known = [tensor for tensor in tensors if compressible(tensor) and self._changes.known(tensor)]
                taken = set(map(id, known))
                self._changes.average(known, "shared", plan.left_out)
                tensors = [tensor for tensor in tensors if id(tensor) not in taken]
            finish = self.exchange.start_average(tensors, "shared", plan.left_out)

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

    def equal(self, partition: Partition) -> dict[str, Tensor]:
        """What a sync into a round makes equal on all workers: shared tensors and the blocks that all of them hold."""
        everywhere = [b for b in range(partition.blocks) if len(partition.holders(b)) == partition.workers]
        return self.averaged(everywhere)

    def averaged(self, blocks: Sequence[int]) -> dict[str, Tensor]:
        """Shared tensors, and the tensors of some blocks, that may have changed in this round, by name."""
        names = self._changing | self._layout.changing()
        tensors = dict(self._layout.shared)
        for block in blocks:
            tensors.update(self._layout.blocks[block].tensors())
        return {name: tensor for name, tensor in tensors.items() if name in names}

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
