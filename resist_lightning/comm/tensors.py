"""Checks that a module's tensors can be averaged and sent, and are not replaced; converts data types for sending."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_WIDER = {
    **dict.fromkeys((torch.int16, torch.uint16), torch.int32),
    **dict.fromkeys((torch.uint32, torch.uint64), torch.int64),
    **dict.fromkeys(
        (
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.float8_e4m3fnuz,
            torch.float8_e5m2fnuz,
            torch.float8_e8m0fnu,
        ),
        torch.float32,
    ),
}
"""The data types in which tensors of these types are averaged: gloo and NCCL cannot compute with them."""

_SUMMED = {**_WIDER, torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The data type of a sum where that is not the tensors' own: with 16 bits it is rounded at every worker."""

_KNOWN = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, *_WIDER),
}


def is_continuous(dtype: torch.dtype) -> bool:
    """Whether tensors of this type are averaged; of the others, integers and booleans, the maximum is taken."""
    return dtype.is_floating_point or dtype.is_complex


def computable(tensor: Tensor) -> Tensor:
    """A tensor as real numbers that can be added and compared everywhere: itself, a view, or a wider copy."""
    if tensor.is_complex():
        # A lazy conjugate has the bits of the original.
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


def summable(tensor: Tensor) -> Tensor:
    """A tensor as real numbers whose sum over the workers is rounded only once: itself, a view, or a wider copy."""
    numbers = computable(tensor)
    return numbers.to(_SUMMED.get(numbers.dtype, numbers.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The data type for sums and differences of tensors of a continuous type: 32 bits where it has fewer."""
    return torch.promote_types(_SUMMED.get(dtype, dtype), torch.float32)


def averaged_bytes(tensor: Tensor) -> int:
    """Payload of an average of the tensor, in bytes."""
    parts = 2 if tensor.is_complex() else 1
    dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return parts * tensor.numel() * _SUMMED.get(dtype, dtype).itemsize


def averaged_bytes_by_type(tensors: Iterable[Tensor]) -> Counter[str]:
    """Payload of an average of the tensors in bytes, by data type: each has an all-reduce of its own."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype)] += averaged_bytes(tensor)
    return sizes


def is_known_to_backends(dtype: torch.dtype) -> bool:
    """Whether gloo and NCCL can broadcast tensors of this type."""
    return dtype not in _WIDER


def sendable(flat: Tensor) -> Tensor:
    """A flat tensor, or, where gloo or NCCL does not know its data type, its bytes."""
    return flat.view(torch.uint8) if flat.is_complex() or not is_known_to_backends(flat.dtype) else flat


def all_sendable(messages: Mapping[int, Iterable[Tensor]]) -> dict[int, list[Tensor]]:
    """:func:`sendable` for the messages to, or from, each worker."""
    return {worker: [sendable(flat) for flat in flats] for worker, flats in messages.items()}


def same(one: Tensor, other: Tensor) -> bool:
    """:func:`torch.equal`, for every data type; NaN equals NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = computable(one), computable(other)
    if torch.equal(left, right):
        return True
    either = (left == right) | (left.isnan() & right.isnan())
    return bool(either.all())


def check_tensors(module: nn.Module) -> None:
    """Check that all parameters and buffers can be averaged and sent.

    Raises:
        ValueError: for a sparse or quantized tensor, or one of an unknown data type.
    """
    for name, tensor in named_tensors(module).items():
        if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
            continue
        strided = tensor.layout == torch.strided
        if not strided or tensor.is_quantized or tensor.dtype not in _KNOWN:
            kind = str(tensor.dtype if strided else tensor.layout).removeprefix("torch.")
            raise ValueError(
                f"{name} is a {kind} tensor, which workers can neither average nor send. Keep it outside of parameters "
                "and buffers, as a plain attribute that its forward moves to the device, or make it a dense one."
            )


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by name."""
    # By the base class: torch's checkpoint_wrapper leaves itself out of the names of its own parameters only.
    return {**dict(nn.Module.named_parameters(module)), **dict(module.named_buffers())}


class KnownTensors:
    """A module's tensors at the start: optimizers, buffers and averages keep referring to these objects.

    Buffers that a forward registers later, or puts in the place of one of another shape, are each worker's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known = named_tensors(module)
        self._warned: set[str] = set()
        self._have_memory = False

    def at_start(self) -> dict[str, Tensor]:
        """The known tensors by their names at the start: the same names, in the same order, on all workers."""
        return dict(self._known)

    def registered(self) -> dict[str, Tensor]:
        """The known tensors that the module has now, by their names now."""
        known = set(map(id, self._known.values()))
        return {name: tensor for name, tensor in named_tensors(self._module).items() if id(tensor) in known}

    def keep(self) -> None:
        """Find replacements of known tensors. A buffer's new value is copied into the known one, which is put back.

        The first call gives every tensor separate memory for each of its entries.

        Raises:
            RuntimeError: for a parameter, a new one that trains, and a persistent buffer of another shape or data type.
        """
        if not self._have_memory:
            _give_memory(self._known.values())
            self._have_memory = True
        now = named_tensors(self._module)
        present = {id(tensor) for tensor in now.values()}
        for name, known in self._known.items():
            # It may be present under another name, as pruning leaves it.
            if id(known) in present:
                continue
            if isinstance(known, nn.Parameter):
                raise RuntimeError(_replaced(name, gone=name not in now))
            if name in now:
                self._put_back(name, known, now[name])
        known_ids = {id(tensor) for tensor in self._known.values()}
        for name, tensor in now.items():
            if name not in self._known and id(tensor) not in known_ids:
                self._check_new(name, tensor)

    def _put_back(self, name: str, known: Tensor, new: Tensor) -> None:
        """Register the known buffer again, with the value of the one in its place."""
        owner, key = self._owner(name)
        if (known.shape, known.dtype) != (new.shape, new.dtype):
            if key in owner._non_persistent_buffers_set:  # a cache: this worker's own
                return
            raise RuntimeError(
                f"buffer {name} was {tuple(known.shape)} {known.dtype} when the training began, and is "
                f"{tuple(new.shape)} {new.dtype} now; workers average tensors of one shape and data type. Keep its "
                "shape and data type, or register it with persistent=False if it is a cache of each worker's own."
            )
        # A buffer of an absent block has no memory, and its value comes with the block.
        if not known.is_meta:
            with torch.no_grad():
                known.copy_(new)
        owner._buffers[key] = known

    def _check_new(self, name: str, tensor: Tensor) -> None:
        owner, key = self._owner(name)
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            raise RuntimeError(
                f"parameter {name} was added after the training began, so no worker would average it. Create it in "
                "__init__ or `configure_model`."
            )
        if name not in self._warned and key not in owner._non_persistent_buffers_set:
            self._warned.add(name)
            warnings.warn(
                f"{name} was added after the training began: it is not averaged, and differs between workers.",
                stacklevel=4,
            )

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        return self._module.get_submodule(path), key


def _replaced(name: str, *, gone: bool) -> str:
    what = "is gone from the module" if gone else "is not the object that it was when the training began"
    return (
        f"parameter {name} {what} (by load_state_dict(assign=True), or by assigning a new nn.Parameter), so the "
        "optimizer trains, or the workers average, one that the forward does not use. Write into the existing "
        "parameter: load_state_dict without assign, or `with torch.no_grad(): parameter.copy_(value)`; or change the "
        "module before the optimizers are made."
    )


def _give_memory(tensors: Iterable[Tensor]) -> None:
    """Give each entry memory of its own: where several share one (``expand``), no average could be written."""
    for tensor in tensors:
        dimensions = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in dimensions):
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
