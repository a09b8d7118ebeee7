"""The sync of residual blocks: averaging, merging and hand-over (section 3 of the ResIST paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.exchange import Kinds, Payload
from resist_lightning.comm.quantize import compressible, noise_for
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.layout import BlockLayout, parameters_of
from resist_lightning.methods.resist.subnet import Subnet
from resist_lightning.methods.sync import Sync
from resist_lightning.schedule.transfers import SyncPlan, plan_observation, plan_sync
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.timing import Seconds


class BlockSync(Sync[BlockLayout, SyncPlan]):
    """A worker's side of the syncs of a run whose blocks are partitioned; see :class:`Sync`."""

    def __init__(
        self,
        layout: BlockLayout,
        states: OptimizerStates,
        collective: Collective,
        device: torch.device,
        seconds: Seconds,
    ) -> None:
        super().__init__(layout, states, collective, device, seconds)
        if layout.config.momentum == "travel":
            states.check_travel()
        self._device = device
        self._subnet = Subnet(layout.blocks)
        self._first_forward = FirstForward([])

    @override
    def divide(self, round: int) -> None:
        if self._layout.partial:
            self._first_forward = FirstForward(self._layout.blocks)
        super().divide(round)

    @override
    def end(self) -> None:
        super().end()
        self._first_forward.remove()
        self._subnet.end_early()

    @override
    def plan(self, round: int, left_out: tuple[int, ...]) -> SyncPlan:
        return plan_sync(self._layout.partition(round), self._layout.partition(round + 1), left_out)

    @override
    def averaged(self, plan: SyncPlan) -> dict[str, Tensor]:
        return self._with_blocks(plan.averaged)

    @override
    def replicated_tensors(self, round: int) -> dict[str, Tensor]:
        """Shared tensors, and the blocks that all workers hold."""
        partition = self._layout.partition(round)
        return self._with_blocks([b for b in range(partition.blocks) if len(partition.holders(b)) == partition.workers])

    @override
    def owned_tensors(self) -> list[Tensor]:
        """The tensors of the blocks that are present."""
        return [tensor for block in self._subnet.held() for tensor in block.tensors().values()]

    @override
    def hand_over(self, plan: SyncPlan, round: int) -> None:
        """Merge blocks that several workers held, and bring every block to its next holders."""

        def payload(block: int) -> Payload:
            return self.payload(block, round=round)

        with self._seconds.timed("hand_over"):
            self.exchange.merge(plan, payload, Kinds())
            self.exchange.hand_over(plan, payload, Kinds(), lambda: self.make_room(round + 1))
            self._states.take_numbers()

    @override
    def assemble(self, plan: SyncPlan, kind: str, *, unequal: bool) -> None:
        plan, kinds = plan_observation(plan, self._worker, self._layout.workers), Kinds.all(kind)
        self.leave_out(plan)
        if unequal:
            self.exchange.average(list(self.averaged(plan).values()), kind, plan.left_out)
            self.exchange.merge(plan, self.payload, kinds)
        self.exchange.hand_over(plan, self.payload, kinds, self._subnet.hold_all)
        self.guard.release()

    @override
    def make_room(self, round: int) -> None:
        """Hold the blocks of ``round``, and forget the optimizer state of all that do not stay.

        Of those that arrive too: some optimizers make state of parameters without gradient, so of absent ones.
        """
        held = self._layout.partition(round).held[self._worker]
        self._states.drop(parameters_of(self._subnet.not_staying(held)))
        self._subnet.hold(held, lambda block: self._where_is(block, round))
        if self._layout.companion is not None:
            names = [name for block in held for name in self._layout.blocks[block].tensors()]
            self._layout.companion.hold([*self._layout.shared, *names])
        absent = [block for index, block in enumerate(self._layout.blocks) if index not in held]
        self.guard.watch({block.name: block.module for block in absent})

    def _where_is(self, block: int, round: int) -> str:
        holders = ", ".join(map(str, self._layout.partition(round).holders(block)))
        return f"in round {round} its block is held by worker(s) {holders}, not by worker {self._worker}"

    def payload(self, index: int, *, round: int | None = None) -> Payload:
        """What travels of a block: at the end of ``round``, or (None) to be looked at, exactly and without state."""
        block = self._layout.blocks[index]
        tensors = list(block.tensors().values())
        if round is None:
            return Payload(tensors)
        config = self._layout.config
        state = self._states.tensors(block.module.parameters()) if config.momentum == "travel" else []
        if self._layout.companion is not None:
            state = [*state, *self._layout.companion.tensors(block.tensors())]
        if self._compressed_mean is None:
            return Payload(tensors, state)
        noise = noise_for(config.seed, round, index, self._worker, self._device)
        plain = [tensor for tensor in tensors if not compressible(tensor)]
        return Payload(plain, state, [tensor for tensor in tensors if compressible(tensor)], noise)

    def _with_blocks(self, blocks: Sequence[int]) -> dict[str, Tensor]:
        """Shared tensors, and the tensors of some blocks, that may have changed in this round."""
        tensors = dict(self._layout.shared)
        for block in blocks:
            tensors.update(self._layout.blocks[block].tensors())
        return self._may_change(tensors)
