"""Blocks that a worker does not hold: no memory, no compute, and no stale numbers.

An absent block's parameters keep their Python identity and shape, but have no values, so that optimizers, schedulers
and callbacks stay valid and reading a value raises. Its forward is the identity.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from resist_lightning.absent import Absence, absent_like, is_absent, present_class
from resist_lightning.blocks import Block
from resist_lightning.bypass import Bypass
from resist_lightning.references import who_holds

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


class Presence:
    """Whether this worker holds one block, and the switch.

    Args:
        block: the block; it must be present.

    Attributes:
        absence: what is said to whoever reads a value while the block is absent.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.present = True
        modules = {f"{block.name}.{name}".rstrip("."): module for name, module in block.module.named_modules()}
        self._memory = Memory(block.tensors(), modules)
        self.absence = self._memory.absence
        self._forward = block.module.__dict__.get("forward")
        self._bypass = Bypass(block.name, block.module)

    def free(self) -> None:
        """Make the block absent: free its parameters, gradients and buffers, and bypass it.

        Raises:
            RuntimeError: if a tensor is still in use, by an autograd graph for example.
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

    def hold(self, keep: Collection[int], reason: Callable[[int], str] | None = None) -> None:
        """Free all blocks but those to keep, then allocate those of them that are absent; the caller fills them.

        Args:
            keep: the blocks to keep, by index.
            reason: says of an absent block, by index, where it is.
        """
        for index, presence in enumerate(self._presence):
            if presence.present and index not in keep:
                presence.free()
            if reason is not None and not presence.present:
                presence.absence.reason = reason(index)
        for index in keep:
            if not self._presence[index].present:
                self._presence[index].allocate()

    def end_early(self) -> None:
        """Say to whoever reads a value of an absent block that nobody will bring it."""
        for presence in self._presence:
            presence.absence.end_early()

    def hold_all(self) -> None:
        """Allocate every absent block; the caller fills them."""
        self.hold(range(len(self._presence)))


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
