"""Folds the test-time scale of a residual branch into the weights that end it, and removes it again, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist_lightning.methods.residual import Block

# Exactly these classes: a derived one may do more, such as an activation, or a weight that each call computes.
_LINEAR_IN_WEIGHT = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
_LINEAR_BY_NAME = {"FrozenBatchNorm2d"}  # torchvision's


def foldable(block: Block) -> bool:
    """Whether the scale folds into weights of the block."""
    return bool(folded([block]))


@dataclass(frozen=True)
class Folded:
    """A tensor that a scale folds into.

    Args:
        tensor: the tensor itself.
        divided: whether it is divided by the scale, as the first layer of a gate that gets the scaled branch.
    """

    tensor: Tensor
    divided: bool = False

    def scale(self, scale: float) -> None:
        """Fold a scale into the tensor."""
        self._multiply(self.tensor, scale, self.divided)

    def undo(self, scale: float) -> None:
        """Undo :meth:`scale`, up to rounding."""
        self._multiply(self.tensor, scale, not self.divided)

    def restores(self, scale: float, original: Tensor) -> bool:
        """Whether :meth:`undo` would give the original bit for bit."""
        twin = self.tensor.detach().clone()
        self._multiply(twin, scale, not self.divided)
        return torch.equal(twin, original)

    @staticmethod
    def _multiply(tensor: Tensor, scale: float, divide: bool) -> None:
        if divide:
            tensor.div_(scale)
        else:
            tensor.mul_(scale)


def fold(tensors: Mapping[str, Folded], scale: float) -> dict[str, Tensor]:
    """Fold ``scale`` into the tensors of :func:`folded`.

    Returns:
        Copies, by name, of the tensors that the inverse operation would not restore bit for bit.
    """
    originals: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, each in tensors.items():
            original = each.tensor.detach().clone()
            each.scale(scale)
            if not each.restores(scale, original):
                originals[name] = original
    return originals


def folded(blocks: Iterable[Block]) -> dict[str, Folded]:
    """The tensors, by name, that a scale on the residual branches of present blocks folds into."""
    found: dict[str, Folded] = {}
    for block in blocks:
        if block.seen.ends:
            tensors = block.tensors()
            for end in block.seen.ends:
                for name in (*end.tensors, *end.divided):
                    full = f"{block.name}.{name}"
                    found[full] = Folded(tensors[full], divided=name in end.divided)
        else:
            found.update((name, Folded(tensor)) for name, tensor in last_layer(block).items())
    return found


def unfold(tensors: Mapping[str, Folded], scale: float, originals: Mapping[str, Tensor]) -> None:
    """Undo :func:`fold`, exactly."""
    with torch.no_grad():
        for name, each in tensors.items():
            if name in originals:
                each.tensor.copy_(originals[name])
            else:
                each.undo(scale)


def last_layer(block: Block) -> dict[str, Tensor]:
    """Weight and bias of the branch's last layer, by name; empty if it is not known to be linear in them."""
    if block.branch_end is None:
        return {}
    layer = block.module.get_submodule(block.branch_end)
    if type(layer) not in _LINEAR_IN_WEIGHT and type(layer).__name__ not in _LINEAR_BY_NAME:
        return {}
    own: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    last = {f"{block.name}.{block.branch_end}.{name}": own[name] for name in ("weight", "bias") if name in own}
    # A layer that other blocks have too would be scaled by each of them.
    if "weight" not in own or not last.keys() <= block.tensors().keys():
        return {}
    return last
