"""The subnet of a worker: which residual blocks are present; an absent block is the identity."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.bypass import Bypass
from resist_lightning.state.memory import Memory


class SubnetBlock:
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


class Subnet:
    """The blocks of a worker: which of them it holds.

    Args:
        blocks: the partitionable blocks; all present.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = [SubnetBlock(block) for block in blocks]

    def held(self) -> list[Block]:
        """The blocks that are present."""
        return [subnet.block for subnet in self._blocks if subnet.present]

    def not_staying(self, keep: Collection[int]) -> list[Block]:
        """All blocks but those of ``keep`` that are present."""
        return [p.block for index, p in enumerate(self._blocks) if not (p.present and index in keep)]

    def hold(self, keep: Collection[int], reason: Callable[[int], str] | None = None) -> None:
        """Free all blocks but those to keep, then allocate those of them that are absent; the caller fills them.

        Args:
            keep: the blocks to keep, by index.
            reason: says of an absent block, by index, where it is.
        """
        for index, subnet in enumerate(self._blocks):
            if subnet.present and index not in keep:
                subnet.free()
            if reason is not None and not subnet.present:
                subnet.absence.reason = reason(index)
        for index in keep:
            if not self._blocks[index].present:
                self._blocks[index].allocate()

    def end_early(self) -> None:
        """Say to whoever reads a value of an absent block that nobody will bring it."""
        for subnet in self._blocks:
            subnet.absence.end_early()

    def hold_all(self) -> None:
        """Allocate every absent block; the caller fills them."""
        self.hold(range(len(self._blocks)))
