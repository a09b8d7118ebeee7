"""The sync of IST: sends every neuron, with its weights and optimizer state, to its next holder.

Only tensors that all workers hold whole are averaged (docs/ist.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.methods.ist.holders import handed_over_pieces, merged_pieces, staying_pieces
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.merging import write_means
from resist_lightning.methods.ist.messages import Arrived, KeyedPiece, Messages
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.parts import Parts, in_groups
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import NeuronPlan, Piece, have_several_holders, pieces
from resist_lightning.methods.ist.start import hand_out
from resist_lightning.methods.sync import Sync
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.unmade import allocate, is_unmade


class NeuronSync(Sync[NeuronLayout, NeuronPlan]):
    """A worker's side of the syncs of an IST run; see :class:`Sync`."""

    def __init__(
        self, layout: NeuronLayout, states: OptimizerStates, collective: Collective, device: torch.device
    ) -> None:
        super().__init__(layout, states, collective, device)
        if layout.config.momentum in ("keep", "travel"):
            states.check_travel(layout.config.momentum, instead="'reset'", cut=True)
            if layout.leaves_out_neurons and collective.rank == 0:
                states.warn_of_counts(layout.config.momentum)
        self._messages = Messages(collective, device)
        self._parts = Parts(layout, states, collective.worker, device)
        self._subnet = self._parts.subnet

    @override
    def plan(self, round: int, left_out: tuple[int, ...]) -> NeuronPlan:
        return self._layout.plan(round, left_out)

    @override
    def owned_tensors(self) -> list[Tensor]:
        return list(self._subnet.tensors.values())

    @override
    def end_step(self) -> None:
        self._subnet.note_norms()

    @override
    def make_room(self, round: int) -> None:
        self._subnet.hold(round)
        if self._layout.workers > 1:
            owners = {name.rpartition(".")[0] for name in self._subnet.tensors}
            module = self._layout.module
            self.part_guard.watch({owner: module.get_submodule(owner) for owner in sorted(owners)})

    @override
    def distribute_weights(self, round: int) -> None:
        allocate(self._layout.shared, self._device)
        if self._worker:
            self._parts.cut(round, empty=True)  # parts of others are freed before anything arrives
        hand_out(self._layout, round, self.exchange, self._messages, self._parts.of_weights())

    @override
    def lacks(self, own: Mapping[str, Any]) -> bool:
        # With a full model beside it, the file has no stores of parameters, and this worker has no full model.
        return is_unmade(self._layout.module) and not own["store"].keys() >= self._layout.inner().keys()

    @override
    def keep_own_parts(self, round: int) -> None:
        if not self._subnet.is_held:
            self._parts.cut(round, empty=is_unmade(self._layout.module))  # then its own file has the values
        super().keep_own_parts(round)

    @override
    def hand_over(self, plan: NeuronPlan, round: int) -> None:
        state = self._parts.moving_state()
        parts = {**self._parts.of_weights(), **state}
        if plan.several_holders:
            self._merge(self._parts.of_weights() if self._parts.no_state_travels else parts, plan, "merge")
        after: dict[str, Part] = {}

        # While messages travel: all leaving pieces have been copied by then.
        def write(some: list[Arrived]) -> None:
            if not after:
                after.update(self._parts.of_next(round + 1, state))
            self._put(after, some, plan)

        self._messages.transfer(parts, self._moving_pieces(parts, plan), plan.before, write)
        self._states.take_numbers()

    @override
    def writes_to_assemble(self, plan: NeuronPlan) -> bool:
        return have_several_holders(plan.before)  # means, at their owners

    @override
    def assemble(self, plan: NeuronPlan, kind: str, *, unequal: bool, at_first: bool) -> None:
        self._leave_out(plan)
        # Only between two syncs: right after one, replicas are equal.
        if unequal:
            average = self.exchange.average_at_first if at_first else self.exchange.average
            average(list(self._averaged(plan).values()), kind, plan.left_out)
        merge = unequal and have_several_holders(plan.before)
        for some in in_groups(self._parts.of_weights()):
            if merge:
                self._merge(some, plan, kind)
            if at_first:
                self._make_whole_at_first(some, plan, kind)
            else:
                self._make_whole(some, plan, kind)
        if self._worker == 0 or not at_first:
            self._subnet.hold_all()
            self.part_guard.release()

    def _make_whole(self, parts: Mapping[str, Part], plan: NeuronPlan, kind: str) -> None:
        """Give some tensors all their entries, on every worker. Collective."""
        arrived = self._messages.spread(parts, partial(self._pieces_of, plan), plan.before, kind)
        self._put(self._parts.widened(parts), arrived, plan)

    def _make_whole_at_first(self, parts: Mapping[str, Part], plan: NeuronPlan, kind: str) -> None:
        """Give some tensors all their entries, on worker 0; the others send theirs one after the other. Collective."""
        pieces_of = partial(self._pieces_of, plan)
        whole: Mapping[str, Part] = {}
        if self._worker == 0:
            own = self._messages.own(parts, pieces_of, plan.before)
            whole = self._parts.widened(parts)
            self._put(whole, own, plan)
            del own
        for peer in range(1, self._layout.workers):
            self._put(whole, self._messages.collect(parts, pieces_of, plan.before, kind, peer), plan)

    def _pieces_of(self, plan: NeuronPlan, cut: Cut, worker: int) -> list[Piece]:
        return self._layout.full_pieces(cut, plan, worker)

    @override
    def end(self) -> None:
        super().end()
        # After an error, the module is still the subnet.
        self._subnet.leave(self.incomplete)
        self._parts.store = {}
        self._subnet.gradients = {}
        self._parts.forget_state()

    @override
    def gradients(self) -> dict[str, Tensor]:
        # While the module is the full one, those of the subnet are kept beside it.
        return {**super().gradients(), **self._subnet.gradients}

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        # The full model has the stored parameters, but not their optimizer state.
        already_saved = self._layout.shapes if with_full_model else {}
        store = {key: rows for key, rows in self._parts.store.items() if key not in already_saved}
        return {**super().state_dict(with_full_model=with_full_model), "store": store}

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        for key, rows in own["store"].items():
            self._parts.store[key] = rows.clone()

    def _merge(self, parts: Mapping[str, Part], plan: NeuronPlan, kind: str) -> None:
        """Take the means of entries that several workers hold, in the slice of the owner or the store of the keeper."""
        by_cut = cache(partial(merged_pieces, plan=plan, worker=self._worker))  # many tensors are cut alike
        moving = [(key, piece) for key, part in parts.items() for piece in by_cut(part.cut)]
        arrived: dict[str, list[tuple[Piece, Tensor]]] = defaultdict(list)

        def add(pieces: list[Arrived]) -> None:
            for (key, piece), values in pieces:
                arrived[key].append((piece, values))

        self._messages.transfer(parts, moving, plan.before, add, kind)
        for key, sent in arrived.items():
            write_means(parts[key], sent, plan.before, plan.left_out)

    def _moving_pieces(self, parts: Mapping[str, Part], plan: NeuronPlan) -> list[KeyedPiece]:
        """The pieces that leave or reach this worker, by key, in the same order on all workers."""
        all_moves = handed_over_pieces if plan.several_holders else pieces
        # Many tensors are cut alike, and planning takes time that grows with the square of the workers.
        moved = cache(partial(all_moves, plan=plan, worker=self._worker))
        stayed = cache(partial(staying_pieces, plan=plan, worker=self._worker))
        moving = []
        for key, part in parts.items():
            # Under "keep", optimizer state moves within this worker's slice only.
            planned = stayed if part.is_state and self._parts.no_state_travels else moved
            moving += [(key, piece) for piece in planned(part.cut)]
        return moving

    def _put(self, parts: Mapping[str, Part], arrived: Iterable[Arrived], plan: NeuronPlan) -> None:
        # Slices are those of the next round; stores and full tensors are the same in all rounds.
        for (key, piece), values in arrived:
            parts[key].put(piece, plan.after, values)
