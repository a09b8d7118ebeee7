"""A copy of the module that user code keeps beside it, a moving average of its weights for example."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.state.memory import Memory


class Companion:
    """A copy that goes with the module: a worker holds the same parts of both.

    A block's part of the copy moves with the block. The copies of what all workers hold differ, until the copy is shown
    in the place of the module: the full model that is assembled then is the mean of the copies.

    Args:
        module: the user's.
        copy: a module with tensors of the same names.

    Attributes:
        weights: by name, the module's own values while the copy is shown; otherwise none.
        loaded: whether :meth:`load` was called.
    """

    def __init__(self, module: nn.Module, copy: nn.Module) -> None:
        self.loaded = False
        self.weights: dict[str, Tensor] = {}
        self._module, self._copies = module, named_tensors(copy)
        self._recurrent = [child for child in copy.modules() if isinstance(child, nn.RNNBase)]
        for rnn in self._recurrent:
            rnn._flat_weight_refs = [None] * len(rnn._flat_weights_names)  # weak ones, which would hinder
        self._memory = {name: Memory({f"the average of {name}": copy}, {}) for name, copy in self._copies.items()}

    @property
    def shown(self) -> bool:
        """Whether the module has the copy's values."""
        return bool(self.weights)

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

    def show(self) -> None:
        """Write the copy into the module, each worker what it holds, and keep what was there.

        No write is noted of it (``.data``): nothing is trained here that other workers would have to know.
        """
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
        """Give what this worker holds of the copy the module's values."""
        for own, copy in self.present().values():
            copy.data.copy_(own.data)

    def keep(self, written: Collection[str]) -> None:
        """Let what user code has written while the copy was shown stay, in the copy and in what is hidden."""
        for name, (own, copy) in self.present().items():
            if self.shown and name in written:
                self.weights[name] = own.data.clone()
                copy.data.copy_(own.data)

    def settle(self) -> None:
        """Leave the copy whole for good: all that the module is, which is the full model now."""
        self.hold(self._copies)
        self.copy_module()
        for rnn in self._recurrent:
            rnn._init_flat_weights()
        self.weights = {}

    def state(self) -> dict[str, Tensor]:
        """What this worker holds in the copy's tensors, for :meth:`load`; they may be the live ones."""
        return {name: copy.detach().cpu() for name, (_, copy) in self.present().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, when the module holds the same parts again."""
        with torch.no_grad():
            for name, (_, copy) in self.present().items():
                copy.copy_(state[name])
        self.loaded = True
