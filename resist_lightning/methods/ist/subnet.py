"""Shrinks the user's module to a worker's subnet, and restores its full widths.

Parameters keep their Python identity, as optimizers refer to them; their memory and shape change, and the widths that
modules keep as attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.ist.hooks import HookCheck, check_hooks
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.state.absent import Absence
from resist_lightning.state.memory import make_absent, replace_memory


class Subnet:
    """Switches a worker's module between its subnet and the full model.

    Attributes:
        tensors: by name, the divided tensors of the module.
        gradients: by name, the subnet's gradients, while the module is the full one.
    """

    def __init__(self, layout: NeuronLayout, worker: int, device: torch.device | None = None) -> None:
        self._layout = layout
        self._worker = worker
        named = named_tensors(layout.module)
        self.tensors = {name: named[name] for name in layout.neurons.cuts}
        self.gradients: dict[str, Tensor] = {}
        # Kept, as an error may leave tensors on the meta device, and slices do not show the order of dimensions.
        self._devices = {
            name: (device if tensor.is_meta else None) or tensor.device for name, tensor in self.tensors.items()
        }
        self._orders = {name: _order_in_memory(tensor) for name, tensor in self.tensors.items()}
        self._hooks: list[RemovableHandle] | None = None  # None while the module is the full one
        self._widths: list[int] = []
        self._checks: list[HookCheck] = []
        self._known_hooks: set[int] = set()

    @property
    def is_held(self) -> bool:
        """Whether the module is a subnet now."""
        return self._hooks is not None

    def hold(self, round: int) -> bool:
        """Make the module this worker's subnet of ``round``.

        Returns:
            Whether it has other memory now, which the caller must fill: it was the full model, or of another width.

        Raises:
            RuntimeError: if a tensor is still in use by an autograd graph.
        """
        layout = self._layout
        layers = layout.neurons.layers
        widths = [layout.share(layer, self._worker, round) for layer in range(len(layers))]
        if self.is_held and widths == self._widths:
            return False
        self._unhook()
        self._widths = widths
        for name in self.tensors:
            self._resize(name, layout.held_shape(name, self._worker, round))
        self._set_widths(widths)
        # Only now: torch refuses a gradient of another shape than the parameter's.
        for name, gradient in self.gradients.items():
            self.tensors[name].grad = gradient
        self.gradients = {}
        self._hooks = []
        # Before our own hooks, which need no check.
        self._checks = check_hooks(layout, widths, self._known_hooks)
        # Also after an evaluation, in which the full model computes without them.
        for name, layer in layout.neurons.rescaled:
            self._hook(name, partial(_scaled, layers[layer].width / widths[layer]))
        for name, layer, norms in layout.neurons.rescaled_if_frozen:
            behind = {norm: layout.module.get_submodule(norm) for norm in norms}
            scaled = partial(_scaled, layers[layer].width / widths[layer])
            self._hook(name, partial(_if_frozen, scaled, behind, layout))
        for name, values in layout.neurons.assumed:
            self._hook(name, partial(_as_traced, name, values))
        return True

    def note_norms(self) -> None:
        """Note the norms that have trained in a local step: outside of hooks, as these may be compiled."""
        for _, _, norms in self._layout.neurons.rescaled_if_frozen:
            for name in norms:
                if self._layout.module.get_submodule(name).training:
                    self._layout.trained_norms.add(name)

    def widen(self, name: str) -> None:
        """Make a tensor the full one, with memory that the caller must fill; :meth:`hold` brings its gradient back."""
        tensor = self.tensors[name]
        if tensor.grad is not None:
            self.gradients[name] = tensor.grad
        self._resize(name, self._layout.shapes[name])

    def hold_all(self) -> None:
        """Make the module the full one, when all of its tensors are."""
        self._unhook()
        self._set_widths([layer.width for layer in self._layout.neurons.layers])

    def leave(self, reason: str) -> None:
        """Make tensors of a remaining subnet raise when they are read, as the module will not become the full one."""
        # A module that is whole can be used as it is.
        if not self.is_held or self._layout.workers == 1:
            return
        self._unhook()
        absence = Absence()
        absence.end(reason)
        for name, tensor in self.tensors.items():
            shape = self._layout.shapes[name]
            empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
            # The autograd graph of the batch that failed may still use it; then it stays readable.
            with suppress(RuntimeError):
                replace_memory(name, tensor, empty)
                make_absent(name, tensor, absence)

    def _hook(self, name: str, hook: Callable[..., Any]) -> None:
        assert self._hooks is not None
        module = self._layout.module.get_submodule(name)
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _unhook(self) -> None:
        for hook in self._hooks or []:
            hook.remove()
        self._hooks = None
        for check in self._checks:
            check.end()
            if check.called:
                self._known_hooks.add(check.key)
        self._checks = []

    def _resize(self, name: str, shape: Sequence[int]) -> None:
        tensor, order = self.tensors[name], self._orders[name]
        sizes = [shape[dimension] for dimension in order]
        empty = torch.empty(sizes, dtype=tensor.dtype, device=self._devices[name])
        # Back to the order of dimensions, over memory in the format of the full tensor.
        places = sorted(range(len(order)), key=order.__getitem__)
        replace_memory(name, tensor, empty.permute(places))

    def _set_widths(self, widths: list[int]) -> None:
        for size in self._layout.neurons.sizes:
            width = widths[size.layer] * size.repeat
            module = self._layout.module.get_submodule(size.module)
            setattr(module, size.attribute, (width,) if size.attribute == "normalized_shape" else width)


def _order_in_memory(tensor: Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost: another order than theirs in channels_last."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dimension: strides[dimension], reverse=True)


def _scaled(factor: float, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Scale a layer's input: over fewer neurons, its sums then have the same mean as in the full model."""
    if args:
        return (args[0] * factor, *args[1:]), kwargs
    return args, {**kwargs, "input": kwargs["input"] * factor}


def _if_frozen(
    scaled: Callable[..., tuple[Any, Any]], norms: Mapping[str, nn.Module], layout: NeuronLayout, *call: Any
) -> tuple[Any, Any] | None:
    """Scale a layer's input where a norm behind it has fixed statistics, those of the sum over all neurons."""
    # Asked at each call: programs freeze norms when the training has begun, and compute in evaluation mode.
    for name, norm in norms.items():
        # In this order, as a compiled network would be compiled anew when the set changes.
        if not norm.training and name not in layout.trained_norms:
            return scaled(*call)
    return None


def _as_traced(
    name: str, values: Mapping[str, object], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse calls with other optional arguments than those traced, with which neurons may go elsewhere."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    for argument, value in values.items():
        given = bound.arguments[argument]
        if isinstance(given, Tensor) or given != value:
            raise ValueError(
                f"the forward of {name or 'the module'} is called with {argument}={given!r}, but the paths of its "
                f"neurons were traced with {argument}={value!r}, the default. Make the value that you train with the "
                "default, or split the module."
            )
