"""The subnet of a worker: the user's module with fewer neurons, and back.

Parameters keep their Python identity; what changes is their memory and shape, and what modules know of their widths.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.state.absent import Absence
from resist_lightning.state.memory import make_absent, replace_memory


class Subnet:
    """Gives the module of a worker the widths of its subnet, or its own.

    Args:
        layout: the model's neurons.
        worker: this worker.

    Attributes:
        tensors: by name, the divided tensors of the module.
        gradients: by name, those of the subnet, while the module is the full one.
    """

    def __init__(self, layout: NeuronLayout, worker: int) -> None:
        self._layout = layout
        self._worker = worker
        module = layout.module
        named: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.tensors = {name: named[name] for name in layout.neurons.cuts}
        self._devices = {name: tensor.device for name, tensor in self.tensors.items()}
        self._hooks: list[RemovableHandle] | None = None  # None while the module is the full one
        self.gradients: dict[str, Tensor] = {}

    def hold(self) -> None:
        """Make the module this worker's subnet; where it is the full model, with memory that the caller must fill.

        Raises:
            RuntimeError: if a tensor is still in use by an autograd graph.
        """
        if self._hooks is not None:
            return
        layout = self._layout
        widths = [layout.share(layer, self._worker) for layer in range(len(layout.neurons.layers))]
        self._resize({name: layout.held_shape(name, self._worker) for name in self.tensors}, widths)
        gradients, self.gradients = self.gradients, {}
        for name, gradient in gradients.items():
            self.tensors[name].grad = gradient
        self._hooks = []
        for name, layer in layout.neurons.rescaled:
            self._hook(name, _Scaled(layout.neurons.layers[layer].width / widths[layer]))
        for name, values in layout.neurons.assumed:
            self._hook(name, _AsTraced(name, values))

    def hold_all(self) -> None:
        """Make the module the full one, with memory that the caller must fill; :meth:`hold` brings gradients back."""
        self.gradients = {name: t.grad for name, t in self.tensors.items() if t.grad is not None}
        self._unhook()
        self._resize(self._layout.shapes, [layer.width for layer in self._layout.neurons.layers])

    def leave(self) -> None:
        """After an error: what is left of the subnet raises where it is read, as far as nothing uses it any more."""
        if self._hooks is None or self._layout.workers == 1:
            return
        self._unhook()
        absence = Absence()
        absence.end_early()
        for name, tensor in self.tensors.items():
            with suppress(RuntimeError):  # of the batch that failed
                replace_memory(name, tensor, torch.empty(self._layout.shapes[name], dtype=tensor.dtype, device="meta"))
                make_absent(name, tensor, absence)

    def _hook(self, name: str, hook: Callable[..., Any]) -> None:
        assert self._hooks is not None
        module = self._layout.module.get_submodule(name)
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _unhook(self) -> None:
        for hook in self._hooks or []:
            hook.remove()
        self._hooks = None

    def _resize(self, shapes: Mapping[str, tuple[int, ...]], widths: list[int]) -> None:
        for name, tensor in self.tensors.items():
            new = torch.empty(shapes[name], dtype=tensor.dtype, device=self._devices[name])
            replace_memory(name, tensor, new)
        for size in self._layout.neurons.sizes:
            number = widths[size.layer] * size.repeat
            value = (number,) if size.attribute == "normalized_shape" else number
            setattr(self._layout.module.get_submodule(size.module), size.attribute, value)


class _Scaled:
    """Scales what a layer sums over fewer neurons, so that it stays in the mean what it is in the full model."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0] * self._factor, *args[1:]), kwargs
        return args, {**kwargs, "input": kwargs["input"] * self._factor}


class _AsTraced:
    """Looks whether a module is called as it was when its neurons were followed."""

    def __init__(self, name: str, values: Mapping[str, object]) -> None:
        self._name = name
        self._values = values

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        for argument, value in self._values.items():
            given = bound.arguments[argument]
            if isinstance(given, Tensor) or given != value:
                raise ValueError(
                    f"the forward of {self._name or 'the module'} is called with {argument}={given!r}, and where its "
                    f"neurons go was found with {argument}={value!r}, the default. Make what you train with the "
                    "default, or split the module."
                )
