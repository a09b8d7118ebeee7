"""Absent tensors: shape, type and identity remain, and reading a value raises an error that names the tensor.

The meta device alone is not enough, since reading from it is no error for torch: ``ema.add_(p)`` adds nothing, and
``linear(x, p)`` returns uninitialised memory. So an absent tensor is of a subclass whose operations all end in
``__torch_dispatch__``, however they are called. Reading shape, data type, gradient or hooks is no operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from resist_lightning.errors import PartialModelError

ENDED_EARLY = "the training ended with an error, before the workers assembled the full model"
ENDED_ELSEWHERE = "the training has ended, and worker 0 alone has the full model (full_model_on='first')"
NEW_MODULE = "Load a checkpoint into a new module."


@dataclass
class Absence:
    """The reason why tensors have no values; one object serves all tensors of a part, and may be changed.

    Attributes:
        reason: a clause of the error message.
        way_out: the remedy, the last sentence of the message.
    """

    reason: str = "another worker holds it in this round"
    way_out: str = (
        "Read it where the module is the full model: in validation, from on_validation_epoch_start to "
        "on_validation_end, in a checkpoint, after the training, or inside `engine.full_model()`. In between, skip "
        "what is absent: its `is_meta` is True."
    )

    def end(self, reason: str) -> None:
        """Change the reason: the values will never arrive."""
        self.reason, self.way_out = reason, NEW_MODULE


_aten = torch.ops.aten
_BY_SHAPE = {
    *(_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like),
    *(_aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty_strided),
}


class AbsentTensor:
    """Base of all classes of absent tensors; see :func:`absent_like`."""

    present_class: ClassVar[type[Tensor]]
    absent_name: str
    absence: Absence
    # Otherwise each getter, such as `shape`, would call __torch_function__, which is slow.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Tensor:
        first = args[0] if args else None
        # Optimizers make their state by these; they read the shape only.
        if func.overloadpacket in _BY_SHAPE and isinstance(first, Tensor):
            return _made_like(func, first, args[1:], kwargs or {})
        absent = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, AbsentTensor))
        raise absent._error()

    def _error(self) -> PartialModelError:
        return PartialModelError(f"{self.absent_name} cannot be read: {self.absence.reason}. {self.absence.way_out}")

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise self._error()

    # Torch reads values in these without dispatching an operation.
    numpy = tolist = __array__ = __dlpack__ = __dlpack_device__ = __deepcopy__ = __reduce_ex__ = _refuse
    data = property(_refuse, _refuse)

    @override
    def __repr__(self, **_: object) -> str:
        tensor: Any = self
        kind = self.present_class.__name__
        return f"{kind}(absent: {self.absent_name}, {tuple(tensor.shape)}, {tensor.dtype}; {self.absence.reason})"


def is_absent(tensor: object) -> bool:
    """Whether a tensor was made by :func:`absent_like`."""
    return isinstance(tensor, AbsentTensor)


def present_class(tensor: Tensor) -> type[Any]:
    """The class of a tensor when it has its values."""
    return getattr(type(tensor), "present_class", type(tensor))


def _made_like(func: Any, absent: Any, args: Sequence[Any], kwargs: Any) -> Tensor:
    """A new tensor of the shape of an absent one; absent too, unless it is made on another device."""
    made: Tensor = func(_empty_like(absent), *args, **kwargs)
    if not made.is_meta:
        return made
    return absent_like(made, f"what was made like {absent.absent_name}", absent.absence)


@cache
def _absent_class(present: Any) -> Any:
    return type(present)(f"Absent{present.__name__}", (AbsentTensor, present), {"present_class": present})


def absent_like(tensor: Tensor, name: str, absence: Absence) -> Tensor:
    """A tensor without memory, of a subclass of the class of ``tensor``, with its shape, strides and data type."""
    kind = _absent_class(type(tensor))
    # A result of a forward requires a gradient, but is nothing to be trained.
    trains = tensor.requires_grad and tensor.is_leaf
    made: Any = Tensor._make_subclass(kind, _empty_like(tensor), trains)
    made.absent_name = name
    made.absence = absence
    return made  # type: ignore[no-any-return]


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
