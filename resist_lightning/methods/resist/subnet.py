"""The sub-network of a worker: frees the residual blocks of other workers, which become identities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.bypass import Bypass
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.state.memory import Memory


class SubnetBlock:
    """A block, present or absent.

    Args:
        block: the block; it must be present, or without memory from the beginning.
        device: device of its tensors when it is present.

    Attributes:
        absence: the reason in errors for reading a value while the block is absent.
        bypass: the forward while the block is absent.
    """

    def __init__(self, block: Block, device: torch.device | None = None) -> None:
        self.block = block
        self.present = True
        modules = {f"{block.name}.{name}".rstrip("."): module for name, module in block.module.named_modules()}
        # The objects of tensors and modules stay: optimizers and the user's code refer to them.
        self._memory = Memory(block.tensors(), modules, device)
        self.absence = self._memory.absence
        self._forward = block.module.__dict__.get("forward")
        self.bypass = Bypass(block.name, block.module, block.seen)

    @property
    def unmade(self) -> bool:
        """Whether the block has had no memory so far, and reading it would raise no error."""
        return self._memory.unmade

    def free(self) -> None:
        """Free the block's parameters, gradients and buffers, and bypass it.

        Raises:
            RuntimeError: if a tensor is still in use, by an autograd graph for example.
        """
        self._memory.free()
        self.block.compiled.hold_back("absent")
        self.block.module.forward = self.bypass
        self.present = False

    def allocate(self) -> None:
        """Make the block present again, with memory that the caller must fill."""
        self._memory.allocate()
        if self._forward is None:  # it has its class's
            del self.block.module.forward
        else:
            self.block.module.forward = self._forward
        self.block.compiled.release("absent")
        self.present = True


class Subnet:
    """The blocks that a worker holds.

    Args:
        blocks: the partitionable blocks; all present, or without memory from the beginning.
        device: device of present blocks.
        look: the network that they are in, if the first forward of each block is checked.
    """

    def __init__(
        self, blocks: Sequence[Block], device: torch.device | None = None, *, look: nn.Module | None = None
    ) -> None:
        self._look = look
        self._first_forward: FirstForward | None = None
        self._blocks = [SubnetBlock(block, device) for block in blocks]

    def held(self) -> list[Block]:
        """The blocks that are present."""
        return [subnet.block for subnet in self._blocks if subnet.present]

    def not_staying(self, keep: Collection[int]) -> list[Block]:
        """All blocks but those that are present now and in ``keep``."""
        return [p.block for index, p in enumerate(self._blocks) if not (p.present and index in keep)]

    def forget_gradients(self, keep: Collection[int]) -> list[Block]:
        """Free the gradients of present blocks that are not in ``keep``, and return these: messages need the room."""
        leaving = [p.block for index, p in enumerate(self._blocks) if p.present and index not in keep]
        for block in leaving:
            block.module.zero_grad(set_to_none=True)
        return leaving

    def hold(self, keep: Collection[int], reason: Callable[[int], str] | None = None) -> None:
        """Free all blocks but those to keep, then allocate the absent ones among these; the caller fills them.

        Args:
            keep: the blocks to keep, by index.
            reason: gives the reason of absence for a block, by index.
        """
        if self._look is not None and self._first_forward is None:
            # While the blocks still have their own forwards.
            self._first_forward = FirstForward([subnet.block for subnet in self._blocks], self._look)
        # Freeing comes first, so that the peak is the memory of one sub-network.
        for index, subnet in enumerate(self._blocks):
            if subnet.present and (index not in keep or subnet.unmade):
                subnet.free()
            if reason is not None and not subnet.present:
                subnet.absence.reason = reason(index)
        for index in keep:
            if not self._blocks[index].present:
                self._blocks[index].allocate()

    def end_step(self) -> None:
        """Called after each local step: check whether the network writes into the outputs of absent blocks."""
        for subnet in self._blocks:
            subnet.bypass.settle()

    def written(self) -> dict[str, bool]:
        """For each block that has been absent, by name, whether the network writes into its output in place."""
        return {
            subnet.block.name: subnet.bypass.written for subnet in self._blocks if subnet.bypass.written is not None
        }

    def load_written(self, written: Mapping[str, bool]) -> None:
        """Take over :meth:`written`."""
        # With a copy gradients are added up in another order, so a resumed run must not look anew.
        for subnet in self._blocks:
            subnet.bypass.written = written.get(subnet.block.name)

    def end(self, reason: str) -> None:
        """Remove hooks; let errors for reading an absent block say that its values will never arrive."""
        if self._first_forward is not None:
            self._first_forward.remove()
        for subnet in self._blocks:
            subnet.absence.end(reason)

    def hold_all(self) -> None:
        """Allocate every absent block; the caller fills them."""
        self.hold(range(len(self._blocks)))
