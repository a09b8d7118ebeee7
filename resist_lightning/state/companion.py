"""A copy of the module that the user's code keeps beside it, such as a moving average of the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resist_lightning.comm.packing import packed_bytes
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.state.memory import Memory


class Companion:
    """A copy of the module, with tensors of the same names, of which a worker holds the same parts.

    A block's part of the copy moves with the block. The workers' copies of shared tensors differ, until the copy is
    shown in the place of the module: the full model that is assembled then is the mean of the copies.

    Attributes:
        weights: by name, the module's own values while the copy is shown; otherwise none.
        loaded: whether :meth:`load` was called.
    """

    def __init__(self, module: nn.Module, copy: nn.Module) -> None:
        self.loaded = False
        self.weights: dict[str, Tensor] = {}
        self._module = module
        self._copies = named_tensors(copy)
        self._recurrent = [child for child in copy.modules() if isinstance(child, nn.RNNBase)]
        for rnn in self._recurrent:
            # Weak references to them keep torch from freeing memory.
            rnn._flat_weight_refs = [None] * len(rnn._flat_weights_names)
        # One for each tensor, so that each block can be freed and allocated alone.
        self._memory: dict[str, Memory] = {}
        for name, tensor in self._copies.items():
            self._memory[name] = Memory({f"the average of {name}": tensor}, {})

    @property
    def shown(self) -> bool:
        """Whether the module has the copy's values."""
        return bool(self.weights)

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """The copy's tensors for some of the module's, present or not."""
        return [self._copies[name] for name in names]

    def bytes(self, names: Iterable[str]) -> int:
        """Bytes of :meth:`tensors`."""
        return packed_bytes(self.tensors(names))

    def present(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, the module's and the copy's tensor, for each tensor that this worker holds."""
        pairs = {}
        for name, own in named_tensors(self._module).items():
            copy = self._copies.get(name)  # there is none of a buffer that a forward has registered since
            if copy is not None and not own.is_meta and not copy.is_meta:
                pairs[name] = own, copy
        return pairs

    def hold(self, names: Collection[str]) -> None:
        """Free all tensors of the copy but these, and allocate missing ones for the caller to fill."""
        for name, memory in self._memory.items():
            absent, wanted = self._copies[name].is_meta, name in names
            if absent and wanted:
                memory.allocate()
            elif not absent and not wanted:
                memory.free()

    def show(self) -> None:
        """Write this worker's part of the copy into the module, and keep the module's values."""
        # Through `.data`, which counts as no write: other workers need not know.
        for name, (own, copy) in self.present().items():
            self.weights[name] = own.data.clone()
            own.data.copy_(copy.data)

    def hide(self) -> None:
        """Undo :meth:`show`, exactly."""
        for name, (own, _) in self.present().items():
            own.data.copy_(self.weights[name])
        self.weights = {}

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Inside, the copy is shown."""
        already = self.shown
        if not already:
            self.show()
        try:
            yield
        finally:
            if not already:
                self.hide()

    def copy_module(self) -> None:
        """Let the copy begin with the module's values."""
        for own, copy in self.present().values():
            copy.data.copy_(own.data)

    def keep(self, written: Collection[str]) -> None:
        """Keep, in the copy and in the hidden weights, tensors that user code has written while the copy was shown."""
        if not self.shown:
            return
        for name, (own, copy) in self.present().items():
            if name in written:
                self.weights[name] = own.data.clone()
                copy.data.copy_(own.data)

    def settle(self) -> None:
        """End the training: the copy becomes whole and equal to the module, which is the full model now."""
        self.hold(self._copies)
        self.copy_module()
        for rnn in self._recurrent:
            rnn._init_flat_weights()
        self.weights = {}

    def state(self) -> dict[str, Tensor]:
        """This worker's part of the copy, for :meth:`load`; the tensors may be the live ones."""
        state = {}
        for name, (_, copy) in self.present().items():
            state[name] = copy.detach().cpu()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a :meth:`state`, when the module holds the same parts again."""
        with torch.no_grad():
            for name, (_, copy) in self.present().items():
                copy.copy_(state[name])
        self.loaded = True
