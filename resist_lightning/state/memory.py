"""Frees and allocates the memory of tensors whose Python objects stay."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from resist_lightning.state.absent import Absence, absent_like, is_absent, present_class
from resist_lightning.state.references import who_holds

CPU = torch.device("cpu")
_OF_ABSENT = ("absent_name", "absence")  # attributes that only absent tensors have


class Memory:
    """Frees and restores the memory of tensors; the Python objects, which optimizers and user code refer to, stay.

    Args:
        tensors: the tensors by name; all present, or on the meta device, as in a module that was built without memory.
        modules: by name, the modules that own them.
        device: device for those without memory, once they get some; None if they stay on the meta device.

    Attributes:
        absence: the reason in errors for reading a value while the memory is free.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], device: torch.device | None = None
    ) -> None:
        self.absence = Absence()
        self._tensors = dict(tensors)
        self._modules = dict(modules)
        self._devices = {
            name: (device if tensor.is_meta else None) or tensor.device for name, tensor in tensors.items()
        }
        self._recurrent = [module for module in modules.values() if isinstance(module, nn.RNNBase)]
        self._of_derived = Absence()

    @property
    def unmade(self) -> bool:
        """Whether some tensors have no memory although nothing says that they are absent."""
        made = [self._tensors[name] for name, device in self._devices.items() if device.type != "meta"]
        return any(tensor.is_meta and not is_absent(tensor) for tensor in made)

    def free(self) -> None:
        """Free the tensors' memory, and their gradients.

        Raises:
            RuntimeError: if a tensor is still in use, by an autograd graph for example.
        """
        for rnn in self._recurrent:
            # Torch swaps no tensor that has weak references; `_init_flat_weights` makes new ones.
            rnn._flat_weight_refs = [None] * len(rnn._flat_weights_names)
        self._free_derived()
        for name, tensor in self._tensors.items():
            make_absent(name, tensor, self.absence)

    def allocate(self) -> None:
        """Allocate the tensors' memory, for the caller to fill."""
        for name, tensor in self._tensors.items():
            device = self._devices[name]
            empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            replace_memory(name, tensor, empty)
        for rnn in self._recurrent:
            rnn._init_flat_weights()
        self._of_derived.reason, self._of_derived.way_out = "it is computed in each forward", "Call its module first."

    def _free_derived(self) -> None:
        """Free plain attributes that each forward computes from the tensors, as weight_norm does."""
        self._of_derived.reason, self._of_derived.way_out = self.absence.reason, self.absence.way_out
        for name, module in self._modules.items():
            for key, value in list(vars(module).items()):
                if not isinstance(value, Tensor) or is_absent(value):
                    continue
                # A result that is kept would also keep the autograd graph, and by it the memory of the parameters.
                if value.grad_fn is not None or _is_computed(module, key):
                    vars(module)[key] = absent_like(value, f"{name}.{key}", self._of_derived)


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether an attribute is computed from a parameter before each forward: weight_norm, spectral_norm, pruning."""
    return any(f"{name}{suffix}" in module._parameters for suffix in ("_g", "_orig"))


def make_absent(name: str, tensor: Tensor, absence: Absence) -> None:
    """Free the memory of ``tensor``, whose Python object stays; reading a value now raises a PartialModelError.

    Raises:
        RuntimeError: if something still uses the memory.
    """
    _swap(name, tensor, absent_like(tensor, name, absence))


def replace_memory(name: str, tensor: Tensor, new: Tensor) -> None:
    """Let ``tensor``, whose Python object stays, have the memory of ``new``.

    Raises:
        RuntimeError: if something still uses the memory that it had.
    """
    if isinstance(tensor, nn.Parameter):
        # The swap exchanges the classes too, so the new memory must come as the class that the tensor had.
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__class__ = present_class(tensor)
    _swap(name, tensor, new)


def _swap(name: str, tensor: Tensor, new: Tensor) -> None:
    tensor.grad = None
    # Attributes that the user's code has set stay with the object; a swap would exchange them.
    attributes = {key: value for key, value in tensor.__dict__.items() if key not in _OF_ABSENT}
    new.__dict__.update(attributes)
    hooks, late_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    try:
        swap_tensors(tensor, new)
    except RuntimeError:
        gc.collect()  # a graph in a reference cycle is garbage, but still refers to the tensor
        try:
            swap_tensors(tensor, new)
        except RuntimeError as error:
            raise RuntimeError(f"{name} cannot be handed over: {who_holds(tensor)}") from error
    # Gradient hooks belonged to the old memory; setting the attributes registers them with the new one.
    for name_of_hooks, kept in (("_backward_hooks", hooks), ("_post_accumulate_grad_hooks", late_hooks)):
        setattr(tensor, name_of_hooks, None)
        setattr(tensor, name_of_hooks, kept)


def move_present(module: nn.Module, device: torch.device) -> None:
    """Move a module; tensors without memory stay so: those that an error leaves absent, and those not made yet."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.to(device)  # a module may move more than tensors
        return
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
