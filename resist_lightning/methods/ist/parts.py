"""A worker's parts of all divided tensors and of their optimizer state: cuts them, and makes room for new ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece, own_slice
from resist_lightning.methods.ist.subnet import Subnet
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.unmade import allocate


class Parts:
    """The parts of one worker.

    Args:
        layout: the division of tensors.
        states: the optimizers' state.
        worker: the worker.
        device: device on which tensors without memory get it.

    Attributes:
        subnet: switches the module between slices and full tensors.
        store: by name of a tensor, or key of its optimizer state, the rows that this worker keeps.
    """

    def __init__(self, layout: NeuronLayout, states: OptimizerStates, worker: int, device: torch.device) -> None:
        self.subnet = Subnet(layout, worker, device)
        self.store: dict[str, Tensor] = {}
        self._layout = layout
        self._states = states
        self._worker = worker
        self._device = device
        self._parameters = {}
        for name, tensor in self.subnet.tensors.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor

    @property
    def no_state_travels(self) -> bool:
        """Whether optimizer state never leaves its worker: it stays ("keep") or is forgotten ("reset")."""
        return self._layout.config.momentum != "travel"

    def of_weights(self) -> dict[str, Part]:
        """This worker's part of every divided tensor, by name."""
        return {name: self._part(name) for name in self._layout.neurons.cuts}

    def widened(self, names: Iterable[str]) -> dict[str, Part]:
        """Give some tensors the memory of the full model, which the caller must fill, and return their parts."""
        parts = {}
        for name in names:
            self.subnet.widen(name)
            parts[name] = self._part(name)
        return parts

    def moving_state(self) -> dict[str, Part]:
        """Optimizer state that travels with its entries, by key."""
        if self._layout.config.momentum == "reset":
            return {}
        if not self.no_state_travels and self._layout.workers > 1:
            for name in self._layout.inner():
                stored = self.store[name].shape
                for key, slot in self._slots(name).items():
                    # State that did not exist when training began starts with zeros.
                    self.store.setdefault(key, torch.zeros(stored, dtype=slot.dtype))
        return self._of_state(self._parameters)

    def cut(self, round: int, *, empty: bool) -> None:
        """Make the full module this worker's subnet of ``round``.

        Args:
            round: the round that begins.
            empty: whether the caller will fill tensors and stores; else they keep their values. State always does.
        """
        held = self._layout.partition(round)
        self._states.forget_odd()  # state of another shape than its parameter's cannot be divided
        known = [name for name, parameter in self._parameters.items() if self._states.known(parameter)]
        # State has no values where its parameter has no memory.
        allocate({name: self._parameters[name] for name in known}, self._device)
        counters = self._counters(known)
        weights = self.of_weights()
        if empty:
            self._make_stores(weights)
            weights = {}
        slices: list[tuple[str, Piece, Tensor]] = []
        # Slices and stores are copied out first: to make room, the full tensors are given up.
        for key, part in {**weights, **self._of_state(known)}.items():
            piece = replace(own_slice(part.cut, held, self._worker), leaves="full", enters="slice")
            slices.append((key, piece, part.take(piece, held)))
            if self._needs_store(part):
                mine = self._kept_rows(part)
                rows = part.tensor.detach()[mine.start : mine.stop]
                self.store[key] = rows.cpu().clone()
        self.subnet.hold(round)
        # The tensors have the shapes of slices now; the optimizers' state of them must follow before it is filled.
        parts = {**self.of_weights(), **self._new_state(counters)}
        for key, piece, values in slices:
            parts[key].put(piece, held, values)
        self._states.take_numbers()

    def of_next(self, round: int, state: dict[str, Part]) -> dict[str, Part]:
        """Make room for a round. The caller must fill the slices of weights and of moving state."""
        self._forget_others(state)
        # Gradients belong to the neurons that have left.
        for tensor in self.subnet.tensors.values():
            tensor.grad = None
        counters = self._counters({_parameter_of(key) for key in state})
        if self.subnet.hold(round):
            state = self._new_state(counters)
        # Under "keep" only a part of the state arrives; state of neurons that left must not meet other neurons.
        for part in state.values():
            part.tensor.zero_()
        return {**self.of_weights(), **state}

    def forget_state(self) -> None:
        """Drop the optimizer state of slices, which does not fit the full model."""
        if self._layout.workers > 1:
            self._states.drop(self._parameters.values())

    def _part(self, name: str) -> Part:
        cut, shape = self._layout.neurons.cuts[name], tuple(self._layout.shapes[name])
        return Part(cut, shape, self._worker, self.subnet.tensors[name], self.store.get(name))

    def _make_stores(self, weights: dict[str, Part]) -> None:
        for name, part in weights.items():
            if self._needs_store(part):
                # Zeros where entries are in slices: snapshots contain the whole store.
                shape = len(self._kept_rows(part)), *part.whole[1:]
                self.store[name] = torch.zeros(shape, dtype=part.tensor.dtype)

    def _kept_rows(self, part: Part) -> range:
        return kept_rows(part.whole[0], self._layout.workers, self._worker)

    def _needs_store(self, part: Part) -> bool:
        """Whether some entries of a tensor are in nobody's slice in some round, so that a keeper must store them."""
        inner = part.cut.rows is not None and part.cut.columns is not None
        if self._layout.workers == 1 or not inner:
            return False
        # Under "keep", only state of entries that stay in a slice is kept.
        return not (part.is_state and self.no_state_travels)

    def _forget_others(self, moving: Iterable[str]) -> None:
        """Drop optimizer state that does not move, such as of frozen parameters: it would meet other neurons."""
        moved = {_parameter_of(key) for key in moving}
        others = [parameter for name, parameter in self._parameters.items() if name not in moved]
        self._states.drop(others)
        # In the store, state has keys of its own; parameters and buffers stay.
        state = [key for key in self.store if key not in self._layout.shapes]
        for key in state:
            if _parameter_of(key) not in moved:
                del self.store[key]

    def _of_state(self, names: Iterable[str]) -> dict[str, Part]:
        parts = {}
        for name in names:
            cut = self._layout.neurons.cuts[name]
            shape = tuple(self._layout.shapes[name])
            for key, slot in self._slots(name).items():
                store = self.store.get(key)
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
        return self._of_state(counters)


def in_groups(parts: Mapping[str, Part]) -> Iterator[dict[str, Part]]:
    """Groups of parts whose full tensors are together no larger than the largest one."""
    sizes = {name: prod(part.whole) * part.tensor.element_size() for name, part in parts.items()}
    group: dict[str, Part] = {}
    for name, part in parts.items():
        if sum(sizes[other] for other in group) + sizes[name] > max(sizes.values()):
            yield group
            group = {}
        group[name] = part
    yield group


def _parameter_of(key: str) -> str:
    """The parameter whose optimizer state has this key."""
    return key.rpartition("/")[0]
