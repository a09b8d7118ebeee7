"""The tensors of each fragment of a network whose syncs cover one fragment at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from resist_lightning.comm.mean import mean_into
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.methods.residual import Block
from resist_lightning.schedule.fragments import fragment_of_block, spread

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


class Fragments:
    """The fragment of each tensor of a module.

    Args:
        shared: the tensors that are in no block, by name.
        blocks: the partitionable blocks.
        count: number of fragments; 1: the whole network is one.

    Raises:
        ValueError: if there are more fragments than modules with tensors.
    """

    def __init__(self, shared: Mapping[str, Tensor], blocks: Sequence[Block], count: int) -> None:
        self._of = spread({name: tensor.nbytes for name, tensor in shared.items()}, count)
        names = {id(tensor): name for name, tensor in shared.items()}
        for number, block in enumerate(blocks):
            self._of.update(dict.fromkeys(block.tensors(), fragment_of_block(number, count)))
            names.update({id(tensor): name for name, tensor in block.tensors().items()})
        # By identity of the tensor: one may get another name, and a module new tensors, which no sync averages.
        self._of_tensors = {key: self._of[name] for key, name in names.items()}
        self._count = count
        used = len(set(self._of.values()))
        if used < count:
            raise ValueError(f"fragments={count}: this network has tensors for {used}. Choose as many or fewer.")

    def covers(self, fragment: int | None, name: str) -> bool:
        """Whether a tensor is in a fragment, by its first name; None: the whole network."""
        return fragment is None or self._of.get(name) == fragment

    def within(self, fragment: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors that belong to a fragment."""
        return {name: tensor for name, tensor in tensors.items() if self.covers(fragment, name)}

    def parts(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """For each fragment, its tensors among ``tensors``, by name."""
        return [self.within(fragment, tensors) for fragment in range(self._count)]

    def inside(self, fragment: int, tensors: Iterable[AnyTensor]) -> list[AnyTensor]:
        """The tensors that belong to a fragment."""
        return [tensor for tensor in tensors if self._of_tensors.get(id(tensor)) == fragment]

    def outside(self, fragment: int | None) -> set[int]:
        """By identity, the tensors that are in other fragments."""
        if fragment is None:
            return set()
        return {key for key, own in self._of_tensors.items() if own != fragment}


def mean_of_holders(module: nn.Module, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The full model, from the workers' tensors between two rounds, where holders of a tensor have different values.

    Args:
        module: a module of this model.
        parts: the tensors of each worker, by name.
    """
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            found.setdefault(name, []).append(tensor)
    means: dict[str, Tensor] = {}
    for name, (first, *others) in found.items():
        means[name] = first.clone()
        if others:
            mean_into(means[name], others)
    normalise([means[name] for name in unit_vectors(module) if name in means and len(found[name]) > 1])
    return means
