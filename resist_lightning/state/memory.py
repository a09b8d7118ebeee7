"""Frees and allocates the memory of tensors whose Python objects stay."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from resist_lightning.state.absent import Absence, absent_like, is_absent, present_class
from resist_lightning.state.references import who_holds

_OF_ABSENT = ("absent_name", "absence")  # attributes that a tensor has only while it is absent


class Memory:
    """The memory of some tensors, which can be given back while the tensors, as Python objects, stay.

    Args:
        tensors: by name; they have their memory.
        modules: by name, the modules that have them.

    Attributes:
        absence: what is said to whoever reads a value in between.
    """

    def __init__(self, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        self.absence = Absence()
        self._tensors = dict(tensors)
        self._modules = dict(modules)
        self._devices = {name: tensor.device for name, tensor in tensors.items()}
        self._recurrent = [module for module in modules.values() if isinstance(module, nn.RNNBase)]
        self._of_derived = Absence()

    def free(self) -> None:
        """Take the tensors' memory; gradients are gone.

        Raises:
            RuntimeError: if a tensor is still in use, by an autograd graph for example.
        """
        for rnn in self._recurrent:
            rnn._flat_weight_refs = [None] * len(rnn._flat_weights_names)  # weak ones, which would hinder
        self._free_derived()
        for name, tensor in self._tensors.items():
            make_absent(name, tensor, self.absence)

    def allocate(self) -> None:
        """Give the tensors memory again, which the caller must fill."""
        for name, tensor in self._tensors.items():
            device = self._devices[name]
            empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            replace_memory(name, tensor, empty)
        for rnn in self._recurrent:
            rnn._init_flat_weights()
        self._of_derived.reason, self._of_derived.way_out = "it is computed in each forward", "Call its module first."

    def _free_derived(self) -> None:
        """Take the memory of plain attributes that a forward computes from the tensors: it does so anew in the next."""
        self._of_derived.reason, self._of_derived.way_out = self.absence.reason, self.absence.way_out
        for name, module in self._modules.items():
            for key, value in list(vars(module).items()):
                if not isinstance(value, Tensor) or is_absent(value):
                    continue
                if value.grad_fn is not None or _is_computed(module, key):
                    vars(module)[key] = absent_like(value, f"{name}.{key}", self._of_derived)


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether an attribute is made of a parameter before each forward: weight_norm, spectral_norm, pruning."""
    return any(f"{name}{suffix}" in module._parameters for suffix in ("_g", "_orig"))


def make_absent(name: str, tensor: Tensor, absence: Absence) -> None:
    """Take the memory of ``tensor``, the Python object; from now on reading a value raises a PartialModelError.

    Raises:
        RuntimeError: if something still uses the memory.
    """
    _swap(name, tensor, absent_like(tensor, name, absence))


def replace_memory(name: str, tensor: Tensor, new: Tensor) -> None:
    """Give ``tensor``, the Python object, the memory of ``new``.

    Raises:
        RuntimeError: if something still uses the memory that it had.
    """
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__class__ = present_class(tensor)
    _swap(name, tensor, new)


def _swap(name: str, tensor: Tensor, new: Tensor) -> None:
    tensor.grad = None
    new.__dict__.update({key: value for key, value in tensor.__dict__.items() if key not in _OF_ABSENT})
    hooks, late_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    try:
        swap_tensors(tensor, new)
    except RuntimeError:
        gc.collect()  # a graph in a reference cycle is no longer used by anybody
        try:
            swap_tensors(tensor, new)
        except RuntimeError as error:
            raise RuntimeError(f"{name} cannot be handed over: {who_holds(tensor)}") from error
    # Gradient hooks belong to the memory that has just gone; setting the attributes registers them with the new one.
    for name_of_hooks, kept in (("_backward_hooks", hooks), ("_post_accumulate_grad_hooks", late_hooks)):
        setattr(tensor, name_of_hooks, None)
        setattr(tensor, name_of_hooks, kept)


def present_to_cpu(module: nn.Module) -> None:
    """Move to the CPU what this worker has; blocks that are absent, after an error, stay so."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if not tensor.is_meta:
                tensor.data = tensor.data.cpu()
