"""The sync of IST: sends every neuron, with its weights and optimizer state, to its next holder.

Only tensors that all workers hold whole are averaged (section 2.4 of the specification of IST).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.methods.ist.holders import handed_over_pieces, merged_pieces, staying_pieces
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.merging import write_means
from resist_lightning.methods.ist.messages import Arrived, KeyedPiece, Messages
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import NeuronPlan, Piece, PlannedByCut, have_several_holders, pieces
from resist_lightning.methods.ist.subnet import Subnet
from resist_lightning.methods.sync import Sync
from resist_lightning.schedule.partition import Partition
from resist_lightning.state.optimizer_state import OptimizerStates


class NeuronSync(Sync[NeuronLayout, NeuronPlan]):
    """A worker's side of the syncs of an IST run; see :class:`Sync`."""

    writes_to_assemble = True  # means of what several workers hold, at their owners

    def __init__(
        self, layout: NeuronLayout, states: OptimizerStates, collective: Collective, device: torch.device
    ) -> None:
        super().__init__(layout, states, collective, device)
        if layout.config.momentum in ("keep", "travel"):
            states.check_travel(layout.config.momentum, instead="'reset'", cut=True)
        self._messages = Messages(collective, device)
        self._subnet = Subnet(layout, collective.worker, device)
        self._parameters = {}
        for name, tensor in self._subnet.tensors.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
        # By name of a tensor, or key of its optimizer state: the rows that this worker keeps.
        self._store: dict[str, Tensor] = {}

    @override
    def plan(self, round: int, left_out: tuple[int, ...]) -> NeuronPlan:
        return self._layout.plan(round, left_out)

    @override
    def owned_tensors(self) -> list[Tensor]:
        return list(self._subnet.tensors.values())

    @override
    def make_room(self, round: int) -> None:
        self._subnet.hold(round)
        if self._layout.workers > 1:
            owners = {name.rpartition(".")[0] for name in self._subnet.tensors}
            module = self._layout.module
            self.guard.watch({owner: module.get_submodule(owner) for owner in sorted(owners)})

    @override
    def begin(self, round: int) -> None:
        held = self._layout.partition(round)
        self._states.forget_odd()  # state of another shape than its parameter's cannot be divided
        known = [name for name, parameter in self._parameters.items() if self._states.known(parameter)]
        counters = self._counters(known)
        slices: list[tuple[str, Piece, Tensor]] = []
        # Slices and stores are copied out first: to make room, the full tensors are given up.
        whole = {**self._parts(), **self._parts_of_state(known)}
        for key, part in whole.items():
            piece = self._own_slice(part, held)
            slices.append((key, piece, part.take(piece, held)))
            if self._needs_store(part):
                mine = kept_rows(part.whole[0], self._layout.workers, self._worker)
                rows = part.tensor.detach()[mine.start : mine.stop]
                self._store[key] = rows.cpu().clone()
        super().begin(round)
        # The tensors have the shapes of slices now; the optimizers' state of them must follow before it is filled.
        parts = {**self._parts(), **self._new_state(counters)}
        for key, piece, values in slices:
            parts[key].put(piece, held, values)
        self._states.take_numbers()

    @override
    def hand_over(self, plan: NeuronPlan, round: int) -> None:
        state = self._moving_state()
        parts = {**self._parts(), **state}
        if plan.several_holders:
            self._merge(self._parts() if self._no_state_travels else parts, plan, "merge")
        after: dict[str, Part] = {}

        # While messages travel: whatever leaves has been copied by then.
        def write_what_stays(stays: list[Arrived]) -> None:
            after.update(self._parts_of_next(round + 1, state))
            self._put(after, stays, plan)

        arrived = self._messages.transfer(parts, self._moving_pieces(parts, plan), plan.before, write_what_stays)
        self._put(after, arrived, plan)
        self._states.take_numbers()

    def _parts_of_next(self, round: int, state: dict[str, Part]) -> dict[str, Part]:
        """Make room for a round. The caller must fill the slices, of weights and of the state that moves."""
        self._forget_others(state)
        # Gradients belong to the neurons that have left.
        for tensor in self._subnet.tensors.values():
            tensor.grad = None
        counters = self._counters({_parameter_of(key) for key in state})
        if self._subnet.hold(round):
            state = self._new_state(counters)
        # Under "keep" only a part of the state arrives; what has left must not meet other neurons.
        for part in state.values():
            part.tensor.zero_()
        return {**self._parts(), **state}

    @override
    def assemble(self, plan: NeuronPlan, kind: str, *, unequal: bool) -> None:
        self._assemble(plan, kind, unequal=unequal, at_first=False)

    @override
    def assemble_at_first(self, plan: NeuronPlan, kind: str, *, unequal: bool) -> None:
        self._assemble(plan, kind, unequal=unequal, at_first=True)

    def _assemble(self, plan: NeuronPlan, kind: str, *, unequal: bool, at_first: bool) -> None:
        self._leave_out(plan)
        # Between two syncs only: right after one, replicas are equal.
        if unequal:
            average = self.exchange.average_at_first if at_first else self.exchange.average
            average(list(self._averaged(plan).values()), kind, plan.left_out)
        if unequal and have_several_holders(plan.before):
            self._merge(self._parts(), plan, kind)

        def pieces_of(cut: Cut, worker: int) -> list[Piece]:
            return self._layout.full_pieces(cut, plan, worker)

        # Taken from the slices, before they become whole tensors.
        arrived = self._messages.spread(self._parts(), pieces_of, plan.before, kind, at_first=at_first)
        if self._worker > 0 and at_first:
            return
        self._subnet.hold_all()
        self.guard.release()
        self._put(self._parts(), arrived, plan)

    @override
    def end(self) -> None:
        super().end()
        # After an error, the module is still the subnet.
        self._subnet.leave(self.incomplete)
        self._store = {}
        self._subnet.gradients = {}
        # Optimizer state of slices does not fit the full model.
        if self._layout.workers > 1:
            self._states.drop(self._parameters.values())

    @override
    def gradients(self) -> dict[str, Tensor]:
        # While the module is the full one, those of the subnet are kept beside it.
        return {**super().gradients(), **self._subnet.gradients}

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        # The full model has the stored parameters, but not their optimizer state.
        already_saved = self._layout.shapes if with_full_model else {}
        store = {key: rows for key, rows in self._store.items() if key not in already_saved}
        return {**super().state_dict(with_full_model=with_full_model), "store": store}

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        for key, rows in own["store"].items():
            self._store[key] = rows.clone()

    @property
    def _no_state_travels(self) -> bool:
        """Whether optimizer state never leaves its worker: it stays ("keep") or is forgotten ("reset")."""
        return self._layout.config.momentum != "travel"

    def _merge(self, parts: Mapping[str, Part], plan: NeuronPlan, kind: str) -> None:
        """Give what several workers hold its mean over them, in the slice of its owner or the store of its keeper."""
        by_cut = PlannedByCut(lambda cut: merged_pieces(cut, plan, self._worker))
        moving = [(key, piece) for key, part in parts.items() for piece in by_cut[part.cut]]
        arrived: dict[str, list[tuple[Piece, Tensor]]] = defaultdict(list)

        def add(pieces: list[Arrived]) -> None:
            for (key, piece), values in pieces:
                arrived[key].append((piece, values))

        add(self._messages.transfer(parts, moving, plan.before, add, kind))
        for key, sent in arrived.items():
            write_means(parts[key], sent, plan.before, plan.left_out)

    def _parts(self) -> dict[str, Part]:
        """This worker's part of every divided tensor, by name."""
        parts = {}
        for name, cut in self._layout.neurons.cuts.items():
            shape = tuple(self._layout.shapes[name])
            tensor, store = self._subnet.tensors[name], self._store.get(name)
            parts[name] = Part(cut, shape, self._worker, tensor, store)
        return parts

    def _own_slice(self, part: Part, held: Sequence[Partition]) -> Piece:
        """This worker's slice of a full tensor."""
        rows = columns = None
        if part.cut.rows is not None:
            rows = held[part.cut.rows].held[self._worker]
        if part.cut.columns is not None:
            columns = held[part.cut.columns].held[self._worker]
        return Piece(self._worker, self._worker, rows, columns, leaves="full")

    def _needs_store(self, part: Part) -> bool:
        """Whether some entries of a tensor are in nobody's slice in some round, so that a keeper must store them."""
        inner = part.cut.rows is not None and part.cut.columns is not None
        if self._layout.workers == 1 or not inner:
            return False
        # Under "keep", only state of entries that stay in a slice is kept.
        return not (part.is_state and self._no_state_travels)

    def _moving_pieces(self, parts: Mapping[str, Part], plan: NeuronPlan) -> list[KeyedPiece]:
        """The pieces that leave or reach this worker, by key, in the same order on all workers."""
        all_moves = handed_over_pieces if plan.several_holders else pieces
        moved = PlannedByCut(lambda cut: all_moves(cut, plan, self._worker))
        stayed = PlannedByCut(lambda cut: staying_pieces(cut, plan, self._worker))
        moving = []
        for key, part in parts.items():
            # Under "keep", optimizer state moves within this worker's slice only.
            planned = stayed if part.is_state and self._no_state_travels else moved
            moving += [(key, piece) for piece in planned[part.cut]]
        return moving

    def _moving_state(self) -> dict[str, Part]:
        """Optimizer state that travels with its entries, by key."""
        if self._layout.config.momentum == "reset":
            return {}
        if self._layout.config.momentum == "travel" and self._layout.workers > 1:
            for name in self._layout.inner():
                stored = self._store[name].shape
                for key, slot in self._slots(name).items():
                    # State that did not exist when training began starts with zeros.
                    self._store.setdefault(key, torch.zeros(stored, dtype=slot.dtype))
        return self._parts_of_state(self._parameters)

    def _forget_others(self, moving: Iterable[str]) -> None:
        """Drop optimizer state that does not move, as of frozen parameters: it would meet other neurons."""
        moved = {_parameter_of(key) for key in moving}
        others = [parameter for name, parameter in self._parameters.items() if name not in moved]
        self._states.drop(others)
        # In the store, state has keys of its own; parameters and buffers stay.
        state = [key for key in self._store if key not in self._layout.shapes]
        for key in state:
            if _parameter_of(key) not in moved:
                del self._store[key]

    def _parts_of_state(self, names: Iterable[str]) -> dict[str, Part]:
        parts = {}
        for name in names:
            cut = self._layout.neurons.cuts[name]
            shape = tuple(self._layout.shapes[name])
            for key, slot in self._slots(name).items():
                store = self._store.get(key)
                parts[key] = Part(cut, shape, self._worker, slot, store, is_state=True)
        return parts

    def _slots(self, name: str) -> dict[str, Tensor]:
        """The optimizer state that has the shape of a divided parameter, by key; none for a buffer."""
        parameters = [self._parameters[name]] if name in self._parameters else []
        slots = self._states.tensors(parameters)
        return {f"{name}/{number}": slot for number, slot in enumerate(slots) if slot.dim()}

    def _counters(self, names: Iterable[str]) -> dict[str, list[Tensor]]:
        """The optimizer state that is one number for a whole parameter, such as step counts, by parameter."""
        counters = {}
        for name in names:
            slots = self._states.tensors([self._parameters[name]])
            counters[name] = [slot for slot in slots if not slot.dim()]
        return counters

    def _new_state(self, counters: dict[str, list[Tensor]]) -> dict[str, Part]:
        """Replace state by zeros in the shapes of the slices; counters stay."""
        self._states.drop([self._parameters[name] for name in counters])
        for name, new in self._counters(counters).items():
            for slot, value in zip(new, counters[name], strict=True):
                slot.copy_(value)
        return self._parts_of_state(counters)

    def _put(self, parts: dict[str, Part], arrived: Iterable[Arrived], plan: NeuronPlan) -> None:
        # Slices are those of the next round; stores and full tensors are the same in all rounds.
        for (key, piece), values in arrived:
            parts[key].put(piece, plan.after, values)


def _parameter_of(key: str) -> str:
    """The parameter whose optimizer state has this key."""
    return key.rpartition("/")[0]
