"""A copy of the module that user code keeps beside it, a moving average of its weights for example."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resist_lightning.presence import Memory
from resist_lightning.tensors import named_tensors


class Companion:
    """A copy that goes with the module: a worker holds the same parts of both.

    A block's part of the copy moves with the block. The copies of what all workers hold differ, until the copy is shown
    in the place of the module: the full model that is assembled then is the mean of the copies.

    Args:
        module: the user's.
        copy: a module with tensors of the same names.

    Attributes:
        shown: whether module and copy have exchanged their values.
        loaded: whether :meth:`load` was called.
    """

    def __init__(self, module: nn.Module, copy: nn.Module) -> None:
        self.shown = self.loaded = False
        self._module, self._copies = module, named_tensors(copy)
        self._recurrent = [child for child in copy.modules() if isinstance(child, nn.RNNBase)]
        for rnn in self._recurrent:
            rnn._flat_weight_refs = [None] * len(rnn._flat_weights_names)  # weak ones, which would hinder
        self._memory = {name: Memory({f"the average of {name}": copy}, {}) for name, copy in self._copies.items()}

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """The copy's tensors for some of the module's, present or not."""
        return [self._copies[name] for name in names]

    def bytes(self, names: Iterable[str]) -> int:
        """Bytes of what :meth:`tensors` gives."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors(names))

    def present(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, a tensor of the module and the copy's, of all that this worker holds."""
        pairs = {name: (own, self._copies[name]) for name, own in named_tensors(self._module).items()}
        return {name: pair for name, pair in pairs.items() if not pair[0].is_meta and not pair[1].is_meta}

    def hold(self, names: Collection[str]) -> None:
        """Free all of the copy but the parts of these tensors; the caller fills those that are new."""
        for name, memory in self._memory.items():
            if self._copies[name].is_meta == (name not in names):
                continue
            if name in names:
                memory.allocate()
            else:
                memory.free()

    def exchange(self) -> None:
        """Show the copy in the place of the module, or no longer: exactly, each worker what it holds.

        No write is noted of it (``.data``): nothing is trained here that other workers would have to know.
        """
        for own, copy in self.present().values():
            kept = own.data.clone()
            own.data.copy_(copy.data)
            copy.data.copy_(kept)
        self.shown = not self.shown

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Inside, the copy is shown."""
        already = self.shown
        if not already:
            self.exchange()
        try:
            yield
        finally:
            if not already:
                self.exchange()

    def copy_present(self, names: Collection[str] | None = None) -> None:
        """Give what this worker holds of the copy, of all tensors or of some, the module's values."""
        for name, (own, copy) in self.present().items():
            if names is None or name in names:
                copy.data.copy_(own.data)

    def settle(self) -> None:
        """Leave the copy whole for good: all that the module is, which is the full model now."""
        self.hold(self._copies)
        self.copy_present()
        for rnn in self._recurrent:
            rnn._init_flat_weights()
        self.shown = False

    def state(self) -> dict[str, Tensor]:
        """What this worker holds in the copy's tensors, for :meth:`load`; they may be the live ones."""
        copies = {name: copy.detach() for name, (_, copy) in self.present().items()}
        return {name: copy.clone().cpu() if self.shown else copy.cpu() for name, copy in copies.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, when the module holds the same parts again."""
        with torch.no_grad():
            for name, (_, copy) in self.present().items():
                copy.copy_(state[name])
        self.loaded = True
