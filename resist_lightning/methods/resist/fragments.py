"""The tensors of each fragment of a network whose syncs cover one fragment at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from resist_lightning.methods.residual import Block
from resist_lightning.schedule.fragments import fragment_of_block, spread


class Fragments:
    """Which fragment each tensor of a module is in.

    Args:
        shared: the tensors that are in no block, by name.
        blocks: the partitionable blocks.
        count: number of fragments; 1: the whole network is one.

    Raises:
        ValueError: if there are more fragments than modules with tensors.
    """

    def __init__(self, shared: Mapping[str, Tensor], blocks: Sequence[Block], count: int) -> None:
        self._of = spread({name: tensor.nbytes for name, tensor in shared.items()}, count)
        for number, block in enumerate(blocks):
            self._of.update(dict.fromkeys(block.tensors(), fragment_of_block(number, count)))
        self._count = count
        used = len(set(self._of.values()))
        if used < count:
            raise ValueError(f"fragments={count}: this network has tensors for {used}. Choose as many or fewer.")

    def covers(self, fragment: int | None, name: str) -> bool:
        """Whether a tensor is in a fragment; None: the whole network."""
        return fragment is None or self._of[name] == fragment

    def within(self, fragment: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some tensors, by name, that are in a fragment."""
        return {name: tensor for name, tensor in tensors.items() if self.covers(fragment, name)}

    def parts(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Some tensors, by name, of each fragment."""
        return [self.within(fragment, tensors) for fragment in range(self._count)]

    def outside(self, fragment: int | None, tensors: Mapping[str, Tensor]) -> set[int]:
        """By identity, those of some tensors, by name, that are in other fragments."""
        return {id(tensor) for name, tensor in tensors.items() if not self.covers(fragment, name)}
