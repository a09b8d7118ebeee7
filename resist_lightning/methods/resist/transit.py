"""Tensors in transit during overlapped training: copies for a sync to send, and values that it has brought."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from resist_lightning.comm.mean import move_by
from resist_lightning.comm.tensors import is_continuous


class TransitState(TypedDict):
    """A sync under way in a checkpoint, by name of the tensor."""

    values: dict[str, Tensor]
    own: dict[str, Tensor]
    agreed: list[str]
    blocks_left: bool


class Transit:
    """Copies of the module's tensors that a sync changes beside the training, until they are applied to the module.

    Args:
        agreed: by name, the tensors whose copies will be equal on all workers.

    Attributes:
        blocks_left: whether the blocks to merge and hand over were copied, and are in transit.
    """

    def __init__(self, agreed: Mapping[str, Tensor]) -> None:
        self._agreed = dict(agreed)
        self.blocks_left = False
        # By identity of the module's tensor, which is the same object in all rounds, present or absent.
        self._tensors: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._own: dict[int, Tensor] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Copy this worker's present values of tensors that are averaged, merged or sent."""
        for tensor in tensors:
            if id(tensor) not in self._values:
                self._tensors[id(tensor)] = tensor
                self._values[id(tensor)] = tensor.detach().clone()

    def keep_own(self, tensors: Iterable[Tensor]) -> None:
        """Copy weights once more, as they are now: their change from here on is the difference to these copies."""
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and is_continuous(tensor.dtype):
                self._own[id(tensor)] = tensor.detach().clone()

    def of(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The copies of tensors of the module; for those without a copy, as they are absent, the tensors themselves."""
        return [self._values.get(id(tensor), tensor) for tensor in tensors]

    def make_room(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        """Allocate copies of the tensors that are absent, for the caller to fill."""
        for tensor in tensors:
            if not tensor.is_meta:
                continue
            self._tensors[id(tensor)] = tensor
            self._values[id(tensor)] = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
            )

    def pop(self, tensor: Tensor) -> Tensor:
        """Take out the value that has arrived in the place of a tensor."""
        del self._tensors[id(tensor)]
        return self._values.pop(id(tensor))

    def values(self) -> dict[int, Tensor]:
        """The copies, by identity of the module's tensor."""
        return dict(self._values)

    def agreed(self) -> dict[str, Tensor]:
        """By name, the values that the sync has made equal on all workers."""
        return {name: self._values[id(tensor)] for name, tensor in self._agreed.items()}

    def apply(self, stayed: Collection[int]) -> None:
        """Apply the values that arrived to the module's tensors, whose progress since the copies were made stays.

        Args:
            stayed: by identity, the tensors that this worker has held since then; the others have no value yet.
        """
        for key, tensor in self._tensors.items():
            if tensor.is_meta:  # handed over
                continue
            if key in stayed and key in self._own:
                move_by(tensor, self._own[key], self._values[key])
            else:
                # Buffers lose the steps since then: a variance that is shifted may become negative.
                tensor.detach().copy_(self._values[key])

    def state_dict(self, names: Mapping[int, str]) -> TransitState:
        """State for :meth:`load`, on the CPU; everything must have arrived.

        Args:
            names: names of the module's tensors, by identity.
        """
        values = {names[key]: value.cpu() for key, value in self._values.items()}
        own = {names[key]: value.cpu() for key, value in self._own.items()}
        return {"values": values, "own": own, "agreed": sorted(self._agreed), "blocks_left": self.blocks_left}

    @classmethod
    def load(cls, state: TransitState, tensors: Mapping[str, Tensor], device: torch.device) -> Transit:
        """Undo :meth:`state_dict`.

        Args:
            state: state of a worker that held the same parts.
            tensors: tensors of the module, by name.
            device: device of the copies.
        """
        transit = cls({name: tensors[name] for name in state["agreed"]})
        transit.blocks_left = state.get("blocks_left", True)  # in earlier versions everything left at once
        transit._tensors = {id(tensors[name]): tensors[name] for name in state["values"]}
        transit._values = {id(tensors[name]): value.to(device, copy=True) for name, value in state["values"].items()}
        transit._own = {id(tensors[name]): value.to(device, copy=True) for name, value in state["own"].items()}
        return transit
