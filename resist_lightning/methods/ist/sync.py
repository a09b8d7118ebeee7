"""The sync of IST: sends every neuron, with its weights and optimizer state, to its next holder.

Section 2.4 of the specification of IST. Only tensors that all workers hold whole are averaged.
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
        held = self._layout.partition(round)
        self._states.forget_odd()  # it cannot be cut
        known = [name for name, parameter in self._parameters.items() if self._states.known(parameter)]
        counters = self._counters(known)
        kept: dict[str, tuple[Piece, Tensor]] = {}
        for key, part in {**self._parts(), **self._parts_of_state(known)}.items():
            layers = part.cut.rows, part.cut.columns
            rows, columns = (held[layer].held[self._worker] if layer is not None else None for layer in layers)
            piece = Piece(self._worker, self._worker, rows, columns, leaves="full")
            kept[key] = piece, part.take(piece, held, self._worker)
            if self._needs_store(part):
                mine = kept_rows(part.whole[0], self._layout.workers, self._worker)
                self._store[key] = part.tensor.detach()[mine.start : mine.stop].cpu().clone()
        super().begin(round)
        # The tensors have the shapes of slices now, and so has what optimizers keep of them.
        for key, part in {**self._parts(), **self._new_state(counters)}.items():
            piece, values = kept[key]
            part.put(piece, held, self._worker, values)
        self._states.take_numbers()

    @override
    def hand_over(self, plan: NeuronPlan, round: int) -> None:
        with self._seconds.timed("hand_over"):
            state = self._moving_state()
            moving = {**self._parts(), **state}
            # Planned once for all tensors that are cut alike.
            found = {cut: pieces(cut, plan, self._worker) for cut in {part.cut for part in moving.values()}}
            leaving: list[tuple[str, Piece]] = []
            for key, part in moving.items():
                leaving += [(key, piece) for piece in found[part.cut] if self._moves(part, piece)]
            arrived = self._messages.transfer(moving, leaving, plan.before)
            self._forget_others(state)
            for part in state.values():
                part.tensor.zero_()  # under "keep" only a part of it arrives
            self._put(moving, arrived, plan)
            for tensor in self._subnet.tensors.values():
                tensor.grad = None  # it belongs to the neurons that have left
            self._states.take_numbers()

    @override
    def assemble(self, plan: NeuronPlan, kind: str, *, unequal: bool) -> None:
        self._leave_out(plan)
        if unequal:
            self.exchange.average(list(self._averaged(plan).values()), kind, plan.left_out)
        # Taken from the slices, before they become whole tensors.
        arrived = self._messages.spread(self._parts(), plan.before, kind)
        self._subnet.hold_all()
        self.guard.release()
        self._put(self._parts(), arrived, plan)

    @override
    def end(self) -> None:
        super().end()
        self._subnet.leave()
        self._store = {}
        self._subnet.gradients = {}
        if self._layout.workers > 1:  # state of slices does not fit the full model
            self._states.drop(self._parameters.values())

    @override
    def gradients(self) -> dict[str, Tensor]:
        return {**super().gradients(), **self._subnet.gradients}

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        # The full model has the stored parameters, but not their optimizer state.
        known = self._layout.shapes if with_full_model else {}
        store = {key: rows for key, rows in self._store.items() if key not in known}
        return {**super().state_dict(with_full_model=with_full_model), "store": store}

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        for key, rows in own["store"].items():
            self._store[key] = rows.clone()

    def _parts(self) -> dict[str, Part]:
        """This worker's part of every divided tensor, by name."""
        layout, found = self._layout, {}
        for name, cut in layout.neurons.cuts.items():
            found[name] = Part(cut, tuple(layout.shapes[name]), self._subnet.tensors[name], self._store.get(name))
        return found

    def _needs_store(self, part: Part) -> bool:
        """Whether some entries of a tensor are in nobody's slice in some round, so that a keeper must store them."""
        if self._layout.workers == 1 or part.cut.rows is None or part.cut.columns is None:
            return False
        return part.kind != "state" or self._layout.config.momentum == "travel"

    def _moves(self, part: Part, piece: Piece) -> bool:
        """Whether a piece moves: under ``keep``, optimizer state only within this worker's slice."""
        if part.kind != "state" or self._layout.config.momentum == "travel":
            return True
        return piece.source == piece.target and (piece.leaves, piece.enters) == ("slice", "slice")

    def _moving_state(self) -> dict[str, Part]:
        """Optimizer state that travels with its entries, by key."""
        if self._layout.config.momentum == "reset":
            return {}
        if self._layout.config.momentum == "travel" and self._layout.workers > 1:
            for name in self._layout.inner():
                for key, slot in self._slots(name).items():
                    # State that did not exist when training began starts with zeros.
                    self._store.setdefault(key, torch.zeros(self._store[name].shape, dtype=slot.dtype))
        return self._parts_of_state(self._parameters)

    def _forget_others(self, moving: Iterable[str]) -> None:
        """Drop state that has not moved, of frozen parameters for example: it would meet other neurons."""
        moved = {_parameter_of(key) for key in moving}
        others = [parameter for name, parameter in self._parameters.items() if name not in moved]
        self._states.drop(others)
        # In the store, state has keys of its own; parameters and buffers stay.
        state = [key for key in self._store if key not in self._layout.shapes]
        for key in state:
            if _parameter_of(key) not in moved:
                del self._store[key]

    def _parts_of_state(self, names: Iterable[str]) -> dict[str, Part]:
        layout, found = self._layout, {}
        for name in names:
            cut, shape = layout.neurons.cuts[name], tuple(layout.shapes[name])
            for key, slot in self._slots(name).items():
                found[key] = Part(cut, shape, slot, self._store.get(key), "state")
        return found

    def _slots(self, name: str) -> dict[str, Tensor]:
        """The optimizer state that has the shape of a divided parameter, by key; none for a buffer."""
        parameters = [self._parameters[name]] if name in self._parameters else []
        slots = self._states.tensors(parameters)
        return {f"{name}/{number}": slot for number, slot in enumerate(slots) if slot.dim()}

    def _counters(self, names: Iterable[str]) -> dict[str, list[Tensor]]:
        """The optimizer state that is one number for a whole parameter, such as step counts, by parameter."""
        found = {}
        for name in names:
            slots = self._states.tensors([self._parameters[name]])
            found[name] = [slot for slot in slots if not slot.dim()]
        return found

    def _new_state(self, counters: dict[str, list[Tensor]]) -> dict[str, Part]:
        """Replace state by zeros in the shapes of the slices; counters stay."""
        for name, values in counters.items():
            parameter = self._parameters[name]
            self._states.drop([parameter])
            new = [slot for slot in self._states.tensors([parameter]) if not slot.dim()]
            for slot, value in zip(new, values, strict=True):
                slot.copy_(value)
        return self._parts_of_state(counters)

    def _put(self, parts: dict[str, Part], arrived: Iterable[Arrived], plan: NeuronPlan) -> None:
        """Write the pieces that have arrived."""
        # Slices are those of the next round; stores and full tensors are the same in all rounds.
        for (key, piece), values in arrived:
            parts[key].put(piece, plan.after, self._worker, values)


def _parameter_of(key: str) -> str:
    """The parameter whose optimizer state has this key."""
    return key.rpartition("/")[0]
