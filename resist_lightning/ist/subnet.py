"""The subnet of a worker: the user's module with fewer neurons, and back.

Parameters keep their Python identity; what changes is their memory and shape, and what modules know of their widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resist_lightning.ist.layout import NeuronLayout
from resist_lightning.presence import replace_memory


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
        self._hooks: list[RemovableHandle] = []
        self.gradients: dict[str, Tensor] = {}

    def hold(self, round: int) -> None:
        """Make the module this worker's subnet of ``round``, with memory that the caller must fill.

        Raises:
            RuntimeError: if a tensor is still in use by an autograd graph.
        """
        held = [partition.held[self._worker] for partition in self._layout.partition(round)]
        shapes = {name: self._layout.held_shape(name, round, self._worker) for name in self.tensors}
        self._resize(shapes, [len(neurons) for neurons in held])
        gradients, self.gradients = self.gradients, {}
        for name, gradient in gradients.items():
            self.tensors[name].grad = gradient
        for name, layer in self._layout.neurons.rescaled:
            factor = self._layout.neurons.layers[layer].width / len(held[layer])
            if factor != 1:
                target = self._layout.module.get_submodule(name)
                self._hooks.append(target.register_forward_pre_hook(_Scaled(factor)))

    def hold_all(self) -> None:
        """Make the module the full one, with memory that the caller must fill.

        A :meth:`hold` after it must be of the same round, and gives the subnet its gradients back.
        """
        self.gradients = {name: t.grad for name, t in self.tensors.items() if t.grad is not None}
        self._resize(self._layout.shapes, [layer.width for layer in self._layout.neurons.layers])

    def _resize(self, shapes: Mapping[str, tuple[int, ...]], widths: list[int]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self._factor, *args[1:])
