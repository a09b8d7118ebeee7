"""The sync of ResIST: averages shared tensors, merges replicated blocks, hands blocks over (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.assembly import collect
from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.compressed_mean import CompressedMean
from resist_lightning.comm.quantize import compressible, make_quantizer
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.residual import parameters_of
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.payloads import Payloads
from resist_lightning.methods.resist.scaling import ScaleHooks
from resist_lightning.methods.resist.start import hand_out
from resist_lightning.methods.resist.subnet import Subnet
from resist_lightning.methods.sync import Sync
from resist_lightning.schedule.transfers import SyncPlan, plan_assembly, plan_collection, plan_outer
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.outer import OuterOptimizer
from resist_lightning.state.unmade import allocate


class BlockSync(Sync[BlockLayout, SyncPlan]):
    """A worker's side of the syncs of a run that partitions residual blocks, or (local SGD) nothing."""

    def __init__(
        self, layout: BlockLayout, states: OptimizerStates, collective: Collective, device: torch.device
    ) -> None:
        quantizer = make_quantizer(layout.config.wire, feedback=layout.config.feedback)
        super().__init__(layout, states, collective, device, quantizer)
        if layout.config.momentum == "travel":
            states.check_travel()
        if layout.config.momentum == "reset" and layout.config.fragments > 1:
            states.check_reset_by_parameter()
        self._stepped = False
        look = layout.partial or layout.scaling.scale != 1
        self._subnet = Subnet(layout.blocks, device, look=layout.module if look else None)
        self._compressed_mean = CompressedMean(collective, quantizer) if quantizer is not None else None
        self._outer: OuterOptimizer | None = None
        if layout.config.outer == "nesterov":
            self._outer = OuterOptimizer(layout.config.outer_rate, layout.config.outer_momentum_of(layout.workers))
        self._payloads = Payloads(layout, states, self._outer, collective.worker, device)
        self._begun = False
        # By identity, values that a sync beside the training has brought, until the round has begun with them.
        self._arrived: dict[int, Tensor] = {}
        self._scale_hooks = ScaleHooks([], 1.0)

    @override
    def distribute_weights(self, round: int) -> None:
        if self._worker:
            self.make_room(round)  # what is given to others goes before anything arrives
        allocate(self._layout.shared, self._device)
        hand_out(self._layout, round, self.exchange, self._payloads.of)

    @override
    def end(self) -> None:
        super().end()
        if self._outer is not None:
            self._outer.begin_round([], {})  # frees its copies
        self._scale_hooks.remove()
        self._subnet.end(self.incomplete)

    @override
    def end_step(self) -> None:
        self._stepped = True
        self._subnet.end_step()

    @override
    def begin_round(self, round: int) -> None:
        # At the start all tensors are equal on all workers; later, those that the last sync has covered.
        fragment = self._layout.schedule.fragment(round - 1) if self._begun else None
        self._begun = True
        others, earlier = self._layout.fragments.outside(fragment), self._changing
        if self._outer is not None:
            self._outer.forget_start(others)  # before the new copies, so that there are never two at once
        super().begin_round(round)
        # Tensors that were frozen since the last sync that covered them still differ between workers.
        tensors = named_tensors(self._layout.module)
        self._changing |= {name for name in earlier & tensors.keys() if id(tensors[name]) in others}
        if self._compressed_mean is not None:
            replicated = self._alike(self._replicated(round, fragment).values())
            self._compressed_mean.begin(filter(compressible, replicated), self._arrived, others)
        if self._outer is not None:
            plan = self._layout.schedule.coming_plan(fragment, round)
            stepping = self._with_blocks([*plan.averaged, *self._owned_blocks(plan)], fragment)
            alike = self._alike(stepping.values())
            self._outer.begin_round(alike, self._copies(alike), others)

    @override
    def restart_states(self, round: int) -> None:
        fragment = self._layout.schedule.fragment(round)
        if fragment is None:
            super().restart_states(round)
        else:
            self._states.drop(self._layout.fragments.inside(fragment, self._layout.module.parameters()))

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        state = {**super().state_dict(with_full_model=with_full_model), "written": self._subnet.written()}
        tensors = named_tensors(self._layout.module)
        if self._compressed_mean is not None:
            state |= self._compressed_mean.state_dict(tensors)
        if self._outer is not None:
            elsewhere = state["before"].keys() | state["received"].keys()
            state["outer"] = self._outer.state_dict(tensors, elsewhere, in_training=not with_full_model)
        return state

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        self._subnet.load_written(own.get("written", {}))
        tensors = named_tensors(self._layout.module)
        # Tensors that trained when the round began may be frozen now, or the other way round.
        if self._compressed_mean is not None:
            self._compressed_mean.load_state_dict(own, tensors)
        if self._outer is not None:
            self._outer.load_state_dict(own["outer"], tensors, self._copies(tensors.values()), self._device)

    @override
    def plan(self, round: int, left_out: tuple[int, ...]) -> SyncPlan:
        return self._layout.schedule.plan(round, left_out)

    @override
    def plan_full_model(self, round: int, left_out: tuple[int, ...]) -> SyncPlan:
        return self._layout.schedule.whole_plan(round, left_out)

    @override
    def replicated_tensors(self, round: int) -> dict[str, Tensor]:
        """Shared tensors and blocks that all workers hold, of the fragment that was synced."""
        return self._replicated(round, self._layout.schedule.fragment(round - 1))

    def _replicated(self, round: int, fragment: int | None) -> dict[str, Tensor]:
        partition = self._layout.partition(round)
        held_by_all = [b for b in range(partition.blocks) if len(partition.holders(b)) == partition.workers]
        return self._with_blocks(held_by_all, fragment)

    @override
    def owned_tensors(self) -> list[Tensor]:
        return [tensor for block in self._subnet.held() for tensor in block.tensors().values()]

    @override
    def start_average(self, plan: SyncPlan) -> Finish:
        finish = super().start_average(plan)
        outer = self._outer
        if outer is None:
            return finish

        def finish_and_step() -> None:
            finish()
            outer.step(self._averaged(plan).values())

        return finish_and_step

    @override
    def hand_over(self, plan: SyncPlan, round: int) -> None:
        payload = partial(self._payloads.of, round=round)
        self.agree_on_branches(round)
        # Merging comes first: owners hand over the mean of blocks that several workers held.
        self.exchange.merge(plan, payload)
        if self._outer is not None:
            # A worker that is left out owns only blocks that it alone held: they were reset to the start of the round.
            for index in self._owned_blocks(plan) if self._worker not in plan.left_out else ():
                self._outer.step(self._layout.blocks[index].tensors().values())
            plan = self.with_velocities(plan, round)
        leaving = self._subnet.forget_gradients(self._layout.partition(round + 1).held[self._worker])
        if self._layout.config.momentum != "travel":
            self._states.drop(parameters_of(leaving))
        self.exchange.hand_over(plan, payload, lambda: self.make_room(round + 1))
        self._states.take_numbers()

    def agree_on_branches(self, round: int) -> None:
        """Let all workers know where branches end, if they are scaled in ``round`` or the next one.

        Collective: every worker must call this, in the same order.
        """
        if any(self._layout.training_scale(each) != 1 for each in (round, round + 1)):
            # The hooks of the next round must be the same everywhere, whatever each worker has seen.
            self._layout.agree(self.exchange.collective, stepped=self._stepped)

    def with_velocities(self, plan: SyncPlan, round: int) -> SyncPlan:
        """The plan of the sync at the end of ``round``, with the hand-over of the blocks' outer velocities.

        Velocities are numbered after the blocks: the one of block b of n has the number n + b.
        """
        following = self._layout.schedule.coming_plan(plan.fragment, round + 1)
        travelling = plan_outer(plan, following, self._layout.workers)
        first = len(self._layout.blocks)
        numbered = [transfer._replace(block=first + transfer.block) for transfer in travelling]
        return replace(plan, hand_over=(*plan.hand_over, *numbered))

    @override
    def assemble(self, plan: SyncPlan, kind: str, *, unequal: bool, at_first: bool) -> None:
        whole = self._worker == 0 or not at_first
        if whole:
            self._scale_hooks.remove()
        self._layout.agree(self.exchange.collective, stepped=self._stepped)
        self._leave_out(plan)
        if unequal:
            average = self.exchange.average_at_first if at_first else self.exchange.average
            for part in self._layout.fragments.parts(self._averaged(plan)):  # in the buffers of their syncs
                average(list(part.values()), kind, plan.left_out)
        if at_first:
            if whole:
                self._subnet.hold_all()
            collection = plan_collection(plan, unequal=unequal)
            collect(self.exchange, collection, lambda block: self._payloads.of(block).tensors, kind)
        else:
            plan = plan_assembly(plan, self._worker, self._layout.workers, unequal=unequal)
            if unequal:
                self.exchange.merge(plan, self._payloads.of, kind)
            self.exchange.hand_over(plan, self._payloads.of, self._subnet.hold_all, kind)
        if whole:
            self.part_guard.release()

    @override
    def make_room(self, round: int) -> None:
        """Hold the blocks of ``round``, with their training scale."""
        held = self._layout.partition(round).held[self._worker]
        # Of arriving blocks too: some optimizers make state for parameters without gradient, so for absent ones.
        self._states.drop(parameters_of(self._subnet.not_staying(held)))
        self._subnet.hold(held, lambda block: self._where_is(block, round))
        if self._layout.companion is not None:
            names = [name for block in held for name in self._layout.blocks[block].tensors()]
            self._layout.companion.hold([*self._layout.shared, *names])
        absent = [block for index, block in enumerate(self._layout.blocks) if index not in held]
        self.part_guard.watch({block.name: block.module for block in absent})
        self._scale_hooks.remove()
        present = [self._layout.blocks[index] for index in held]
        self._scale_hooks = ScaleHooks(present, self._layout.training_scale(round), wait=True)

    def _where_is(self, block: int, round: int) -> str:
        holders = ", ".join(map(str, self._layout.partition(round).holders(block)))
        return f"in round {round} its block is held by worker(s) {holders}, not by worker {self._worker}"

    def _owned_blocks(self, plan: SyncPlan) -> list[int]:
        """The blocks that this worker merges."""
        return [block for block, root in plan.owner.items() if root == self._worker]

    def _copies(self, tensors: Iterable[Tensor]) -> dict[int, Tensor]:
        """By identity of the tensor, copies from the beginning of the round that are kept for other purposes."""
        copies = {**self._arrived, **{id(tensor): copy for tensor, copy in self._as_received}}
        for tensor in tensors:
            before = self._compressed_mean.before(tensor) if self._compressed_mean is not None else None
            if before is not None:
                copies[id(tensor)] = before
        return copies

    @override
    def _averaged(self, plan: SyncPlan) -> dict[str, Tensor]:
        return self._with_blocks(plan.averaged, plan.fragment)

    @override
    def _start_average(self, tensors: list[Tensor], plan: SyncPlan) -> Finish:
        if self._compressed_mean is None:
            return super()._start_average(tensors, plan)
        compressed, exact = self.split_averaged(tensors)
        others = self._layout.fragments.outside(plan.fragment)
        self._compressed_mean.average(compressed, "shared", plan.left_out, kept=others)
        return super()._start_average(exact, plan)

    def split_averaged(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Split tensors into those whose mean is compressed and those whose mean is exact."""
        compressed: list[Tensor] = []
        exact: list[Tensor] = []
        for tensor in tensors:
            # Other tensors than parameters, and blocks that not all workers held when the round began, travel exactly.
            mean = self._compressed_mean
            small = mean is not None and compressible(tensor) and mean.known(tensor)
            (compressed if small else exact).append(tensor)
        return compressed, exact

    def _alike(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that are equal on all workers when a round begins: all of them here."""
        return list(tensors)

    @override
    def _averaged_together(self) -> list[dict[str, Tensor]]:
        return self._layout.fragments.parts(self._may_change(self._layout.shared))

    def _with_blocks(self, blocks: Sequence[int], fragment: int | None) -> dict[str, Tensor]:
        """Tensors of a fragment, shared or in some blocks, that may have changed in this round."""
        tensors = dict(self._layout.shared)
        for block in blocks:
            tensors.update(self._layout.blocks[block].tensors())
        return self._may_change(self._layout.fragments.within(fragment, tensors))
