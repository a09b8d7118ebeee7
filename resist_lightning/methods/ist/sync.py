"""The sync of slices: every neuron goes to its next holder, with all that belongs to it.

Section 2.4 of the specification of IST. Nothing is averaged but what all workers hold whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.messages import Arrived, Messages
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import NeuronPlan, Piece, pieces
from resist_lightning.methods.ist.subnet import Subnet
from resist_lightning.methods.sync import Sync
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.timing import Seconds


class NeuronSync(Sync[NeuronLayout, NeuronPlan]):
    """A worker's side of the syncs of a run whose neurons are dealt out; see :class:`Sync`."""

    def __init__(
        self,
        layout: NeuronLayout,
        states: OptimizerStates,
        collective: Collective,
        device: torch.device,
        seconds: Seconds,
    ) -> None:
        super().__init__(layout, states, collective, device, seconds)
        if layout.config.momentum != "reset":
            states.check_travel(layout.config.momentum, instead="'reset'", cut=True)
        self._messages = Messages(collective, device)
        self._subnet = Subnet(layout, collective.worker)
        tensors = self._subnet.tensors.items()
        self._parameters = {name: tensor for name, tensor in tensors if isinstance(tensor, nn.Parameter)}
        self._store: dict[str, Tensor] = {}

    @override
    def plan(self, round: int, left_out: tuple[int, ...]) -> NeuronPlan:
        return self._layout.plan(round, left_out)

    @override
    def owned_tensors(self) -> list[Tensor]:
        return list(self._subnet.tensors.values())

    @override
    def make_room(self, round: int) -> None:
        self._subnet.hold()
        if self._layout.workers > 1:
            owners = {name.rpartition(".")[0] for name in self._subnet.tensors}
            self.guard.watch({name: self._layout.module.get_submodule(name) for name in sorted(owners)})

    @override
    def begin(self, round: int) -> None:
        """Keep this worker's slices, with state that optimizers have of them, and the rows that it is the keeper of."""
        held = self._layout.partition(round)
        self._states.forget_odd()  # it cannot be cut
        known = [name for name, parameter in self._parameters.items() if self._states.known(parameter)]
        counters = self._counters(known)
        kept: dict[str, tuple[Piece, Tensor]] = {}
        for key, part in {**self._parts(), **self._parts_of_state(known)}.items():
            cut, width = part.cut, part.whole[0]
            rows = held[cut.rows].held[self._worker] if cut.rows is not None else None
            columns = held[cut.columns].held[self._worker] if cut.columns is not None else None
            piece = Piece(self._worker, self._worker, rows, columns, leaves="full")
            kept[key] = piece, part.take(piece, held, self._worker)
            travels = part.kind != "state" or self._layout.config.momentum == "travel"
            if cut in self._layout.inner().values() and travels and self._layout.workers > 1:
                mine = kept_rows(width, self._layout.workers, self._worker)
                self._store[key] = part.tensor.detach()[mine.start : mine.stop].cpu().clone()
        super().begin(round)
        for key, part in {**self._parts(), **self._new_state(counters)}.items():
            piece, values = kept[key]
            part.put(piece, held, self._worker, values)
        self._states.take_numbers()

    @override
    def hand_over(self, plan: NeuronPlan, round: int) -> None:
        """Send what leaves to its next holders or keepers, and put what arrives in its place."""
        with self._seconds.timed("hand_over"):
            state = self._moving_state()
            moving = {**self._parts(), **state}
            found = {cut: pieces(cut, plan, self._worker) for cut in {part.cut for part in moving.values()}}
            loads = [(key, piece) for key, d in moving.items() for piece in found[d.cut] if self._moves(d, piece)]
            arrived = self._messages.transfer(moving, loads, plan.before)
            self._forget_others(state)
            for part in state.values():
                part.tensor.zero_()  # under "keep" not all of it arrives
            self._put(moving, arrived, plan)
            for tensor in self._subnet.tensors.values():
                tensor.grad = None  # of other neurons
            self._states.take_numbers()

    @override
    def assemble(self, plan: NeuronPlan, kind: str, *, unequal: bool) -> None:
        self._leave_out(plan)
        if unequal:
            self.exchange.average(list(self._averaged(plan).values()), kind, plan.left_out)
        arrived = self._messages.spread(self._parts(), plan.before, kind)
        self._subnet.hold_all()
        self.guard.release()
        self._put(self._parts(), arrived, plan)

    @override
    def end(self) -> None:
        """The optimizers forget the state of slices, which does not fit the full model."""
        super().end()
        self._subnet.leave()
        self._store = {}
        self._subnet.gradients = {}
        if self._layout.workers > 1:
            self._states.drop(self._parameters.values())

    @override
    def gradients(self) -> dict[str, Tensor]:
        return {**super().gradients(), **self._subnet.gradients}

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        """What this worker has noted, and what it keeps; of that, the full model has the parameters."""
        known = self._layout.shapes if with_full_model else {}
        store = {key: rows for key, rows in self._store.items() if key not in known}
        return {**super().state_dict(with_full_model=with_full_model), "store": store}

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        for key, rows in own["store"].items():
            self._store[key] = rows.clone()

    def _parts(self) -> dict[str, Part]:
        layout = self._layout
        return {
            name: Part(cut, tuple(layout.shapes[name]), self._subnet.tensors[name], self._store.get(name))
            for name, cut in layout.neurons.cuts.items()
        }

    def _moves(self, part: Part, piece: Piece) -> bool:
        """Under ``keep``, of optimizer state only what belongs to entries that stay here."""
        if part.kind != "state" or self._layout.config.momentum == "travel":
            return True
        return piece.source == piece.target and (piece.leaves, piece.enters) == ("slice", "slice")

    def _moving_state(self) -> dict[str, Part]:
        """Optimizer state that goes with the entries that it belongs to."""
        if self._layout.config.momentum == "reset":
            return {}
        if self._layout.config.momentum == "travel" and self._layout.workers > 1:
            for name in self._layout.inner():
                for key, slot in self._slots(name).items():
                    self._store.setdefault(key, torch.zeros(self._store[name].shape, dtype=slot.dtype))
        return self._parts_of_state(self._parameters)

    def _forget_others(self, moving: Iterable[str]) -> None:
        """State that does not move, of frozen parameters or of groups added since, would meet other neurons."""
        moved = {key.rpartition("/")[0] for key in moving}
        self._states.drop([parameter for name, parameter in self._parameters.items() if name not in moved])
        for key in [key for key in self._store if key not in self._layout.shapes]:
            if key.rpartition("/")[0] not in moved:
                del self._store[key]

    def _parts_of_state(self, names: Iterable[str]) -> dict[str, Part]:
        layout = self._layout
        return {
            key: Part(layout.neurons.cuts[name], tuple(layout.shapes[name]), slot, self._store.get(key), "state")
            for name in names
            for key, slot in self._slots(name).items()
        }

    def _slots(self, name: str) -> dict[str, Tensor]:
        """The optimizer state of a divided parameter that has its shape."""
        parameters = [self._parameters[name]] if name in self._parameters else []
        slots = self._states.tensors(parameters)
        return {f"{name}/{number}": slot for number, slot in enumerate(slots) if slot.dim()}

    def _counters(self, names: Iterable[str]) -> dict[str, list[Tensor]]:
        """The optimizer state of divided parameters that is one number each; it stays."""
        found = {name: self._states.tensors([self._parameters[name]]) for name in names}
        return {name: [slot for slot in slots if not slot.dim()] for name, slots in found.items()}

    def _new_state(self, counters: dict[str, list[Tensor]]) -> dict[str, Part]:
        """State of the new shapes: zeros where nothing arrives."""
        for name, values in counters.items():
            parameter = self._parameters[name]
            self._states.drop([parameter])
            new = [slot for slot in self._states.tensors([parameter]) if not slot.dim()]
            for slot, value in zip(new, values, strict=True):
                slot.copy_(value)
        return self._parts_of_state(counters)

    def _put(self, parts: dict[str, Part], arrived: Iterable[Arrived], plan: NeuronPlan) -> None:
        """Write what arrived; slices are those of the next round, stores and full tensors have no round."""
        for (key, piece), values in arrived:
            parts[key].put(piece, plan.after, self._worker, values)
