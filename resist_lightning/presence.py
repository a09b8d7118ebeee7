"""Blocks that a worker does not hold: no memory, no compute, and no stale numbers.

An absent block's parameters keep their Python identity, shape and class, but live on the meta device, so that
optimizers, schedulers and callbacks stay valid and reading a value raises. Its forward is the identity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from resist_lightning.blocks import Block
from resist_lightning.bypass import Bypass


class Memory:
    """The memory of some tensors, which can be given back while the tensors, as Python objects, stay.

    Args:
        tensors: by name; they have their memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._devices = {name: tensor.device for name, tensor in tensors.items()}

    def free(self) -> None:
        """Put the tensors on the meta device; gradients are gone.

        Raises:
            RuntimeError: if a tensor is still in use by an autograd graph.
        """
        for name, tensor in self._tensors.items():
            replace_memory(name, tensor, torch.empty_like(tensor, device="meta"))

    def allocate(self) -> None:
        """Give the tensors memory again, which the caller must fill."""
        for name, tensor in self._tensors.items():
            device = self._devices[name]
            empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            replace_memory(name, tensor, empty)


class Presence:
    """Whether this worker holds one block, and the switch.

    Args:
        block: the block; it must be present.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.present = True
        self._memory = Memory(block.tensors())
        self._forward = block.module.__dict__.get("forward")
        self._bypass = Bypass(block.name, block.module)

    def free(self) -> None:
        """Make the block absent: free its parameters, gradients and buffers, and bypass it.

        Raises:
            RuntimeError: if a tensor is still in use by an autograd graph.
        """
        self._memory.free()
        self.block.module.forward = self._bypass
        self.present = False

    def allocate(self) -> None:
        """Make the block present again, with memory that the caller must fill."""
        self._memory.allocate()
        if self._forward is None:
            del self.block.module.forward
        else:
            self.block.module.forward = self._forward
        self.present = True


class Residency:
    """The blocks of a worker: which of them it holds.

    Args:
        blocks: the partitionable blocks; all present.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._presence = [Presence(block) for block in blocks]

    def held(self) -> list[Block]:
        """The blocks that are present."""
        return [presence.block for presence in self._presence if presence.present]

    def not_staying(self, keep: Collection[int]) -> list[Block]:
        """All blocks but those of ``keep`` that are present."""
        return [p.block for index, p in enumerate(self._presence) if not (p.present and index in keep)]

    def hold(self, keep: Collection[int]) -> None:
        """Free all blocks but those to keep, then allocate those of them that are absent; the caller fills them."""
        for index, presence in enumerate(self._presence):
            if presence.present and index not in keep:
                presence.free()
        for index in keep:
            if not self._presence[index].present:
                self._presence[index].allocate()

    def hold_all(self) -> None:
        """Allocate every absent block; the caller fills them."""
        self.hold(range(len(self._presence)))


def replace_memory(name: str, tensor: Tensor, new: Tensor) -> None:
    """Give ``tensor``, the Python object, the memory of ``new``."""
    tensor.grad = None
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__class__ = tensor.__class__
    new.__dict__.update(tensor.__dict__)
    hooks, late_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    try:
        swap_tensors(tensor, new)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} cannot be handed over while something else still uses it, most often an autograd graph of the "
            "last batch: detach losses and outputs before you keep them."
        ) from error
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
