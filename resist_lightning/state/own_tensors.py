"""Keeps this worker's own tensors while its module is the full model, and detects writes by the user's code."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist_lightning.comm.tensors import named_tensors, same


@dataclass(frozen=True)
class _Before:
    """A tensor before the user's code ran: the object, its version, and a copy where the version may miss writes."""

    tensor: Tensor
    version: int
    value: Tensor | None


class OwnTensors:
    """Copies of a worker's tensors, to put back bit for bit; tensors that user code writes meanwhile stay as written.

    Attributes:
        swapped: whether parameters were exchanged between :meth:`note` and the last :meth:`keep`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.swapped = False
        self._module = module
        self._noted: dict[int, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._watched: dict[str, _Before] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Copy tensors before user code can prepare them for an evaluation, as callbacks for moving averages do."""
        self._noted = {id(tensor): tensor.detach().clone() for tensor in tensors}

    def swapped_since_note(self, tensors: Iterable[Tensor]) -> bool:
        """Whether parameters have been exchanged since :meth:`note`."""
        for tensor in tensors:
            copy = self._noted.get(id(tensor))
            if copy is not None and isinstance(tensor, nn.Parameter) and not same(copy, tensor):
                return True
        return False

    def forget_notes(self) -> None:
        """Free the copies of :meth:`note`."""
        self._noted = {}

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Copy tensors for :meth:`restore`."""
        self.swapped, self._copies = False, []
        for tensor in tensors:
            copy = self._noted.get(id(tensor))
            # A note that still holds serves as the copy.
            if copy is None or not same(copy, tensor):
                self.swapped |= copy is not None and isinstance(tensor, nn.Parameter)
                copy = tensor.detach().clone()
            self._copies.append((tensor, copy))

    def storages(self) -> set[int]:
        """Storage addresses of the tensors that :meth:`restore` will write."""
        return {tensor.untyped_storage().data_ptr() for tensor, _ in self._copies}

    def watch(self, ours: Collection[str]) -> None:
        """Begin to detect writes to buffers and frozen parameters, except those named in ``ours``."""
        # A slice has become a whole tensor: it is ours too.
        shapes = {id(tensor): copy.shape for tensor, copy in self._copies}
        self._watched = {}
        for name, tensor in named_tensors(self._module).items():
            if name in ours or shapes.get(id(tensor), tensor.shape) != tensor.shape:
                continue
            if not isinstance(tensor, nn.Parameter):
                # Code that writes to `.data` changes no version, so the value is compared too.
                self._watched[name] = _Before(tensor, version(tensor), tensor.detach().clone())
            elif not tensor.requires_grad:
                self._watched[name] = _Before(tensor, version(tensor), None)

    def written(self) -> dict[str, Tensor]:
        """The tensors that were written since :meth:`watch`, or put in the place of others, by name."""
        found = {}
        for name, tensor in named_tensors(self._module).items():
            if name in self._watched and _differs(tensor, self._watched[name]):
                found[name] = tensor
        return found

    def write(self, values: Mapping[str, Tensor]) -> set[str]:
        """Write values into the module's tensors of these names that are present, and return their names."""
        named = named_tensors(self._module)
        present = {name for name in values if not named[name].is_meta}
        with torch.no_grad():
            for name in present:
                named[name].copy_(values[name])
        return present

    def as_in_training(self) -> dict[int, Tensor]:
        """This worker's tensors as they will be after :meth:`restore`, by the identity of the module's tensors."""
        tensors = {id(tensor): copy for tensor, copy in self._copies}
        for tensor in self.written().values():
            tensors[id(tensor)] = tensor
        return tensors

    def stop_watching(self) -> Collection[str]:
        """Keep the tensors written so far as they are, and return their names."""
        written = self.written()
        kept = set(map(id, written.values()))
        self._copies = [(tensor, copy) for tensor, copy in self._copies if id(tensor) not in kept]
        self._watched = {}
        return written.keys()

    def restore(self) -> None:
        """Put the copies back, bit for bit."""
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)
        self._copies = []


def version(tensor: Tensor) -> int:
    """A number that changes with every in-place write; 0 for tensors of inference mode, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Iterable[Tensor]) -> int:
    """A number that changes whenever one of the tensors is written."""
    return sum(map(version, tensors))


def _differs(tensor: Tensor, before: _Before) -> bool:
    if tensor is not before.tensor or version(tensor) != before.version:
        return True
    return before.value is not None and not same(tensor, before.value)
