"""Scales the residual branches of partitioned blocks in the full model (section 3.2 of the paper).

In the full model all blocks are active at once, so each branch is multiplied by the probability that a block was held
in training. The factor is folded into the weight and bias of the branch's last layer, so that a checkpoint is a plain
model. A block whose branch has no such layer is scaled by a hook instead: x + s (block(x) - x).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from resist_lightning.methods.layout import Scaling
from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.bypass import first_argument
from resist_lightning.methods.resist.partition import Schedule

# Exactly these classes: a derived one may do more, such as an activation, or a weight that each call computes.
_LINEAR_IN_WEIGHT = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
_LINEAR_BY_NAME = {"FrozenBatchNorm2d"}  # torchvision's


def coverage(schedule: Schedule) -> float:
    """The probability that a worker holds a block: mean blocks per worker / number of blocks (1 if there are none)."""
    if not schedule.blocks:
        return 1.0
    held = schedule.partition(schedule.warmup_rounds).held
    return sum(map(len, held)) / (schedule.workers * schedule.blocks)


def foldable(block: Block) -> bool:
    """Whether the scale folds into the weight and bias of the block's last layer."""
    return bool(_last_layer(block))


def fold(blocks: Iterable[Block], scale: float) -> dict[str, Tensor]:
    """Multiply the residual branches of present blocks by ``scale``, in their weights.

    Returns:
        Copies, by name, of the tensors that dividing by ``scale`` would not restore bit for bit.
    """
    originals: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in folded(blocks).items():
            original = tensor.detach().clone()
            tensor.mul_(scale)
            if not torch.equal(tensor / scale, original):
                originals[name] = original
    return originals


def folded(blocks: Iterable[Block]) -> dict[str, Tensor]:
    """The tensors that :func:`fold` multiplies, by name."""
    found: dict[str, Tensor] = {}
    for block in blocks:
        found.update(_last_layer(block))
    return found


def unfold(blocks: Iterable[Block], scale: float, originals: dict[str, Tensor], only: Collection[str] | None) -> None:
    """Undo :func:`fold`, exactly, for all its tensors (None) or those that are named."""
    with torch.no_grad():
        for name, tensor in folded(blocks).items():
            if only is not None and name not in only:
                continue
            if name in originals:
                tensor.copy_(originals[name])
            else:
                tensor.div_(scale)


class ScaleHook:
    """A forward hook that scales a residual branch.

    It may stay on the user's module, so it pickles, copies and exports with it.

    Args:
        scale: the factor.
        argument: name of the block's input where the hook is on the block: its output becomes x + s (block(x) - x).
            None where it is on the submodule that ends the branch.
    """

    def __init__(self, scale: float, argument: str | None) -> None:
        self.scale = scale
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Called by torch after the forward of the block, or of its last submodule."""
        if self.argument is None:
            return output * self.scale
        x = args[0] if args else kwargs[self.argument]
        return x + self.scale * (output - x)


class ScaleHooks:
    """Scales residual branches while the network runs, without touching a weight.

    For warm-up rounds, and for the full model where a scale cannot be folded.

    Args:
        blocks: the blocks to scale.
        scale: the factor.
    """

    def __init__(self, blocks: Sequence[Block], scale: float) -> None:
        self._handles: list[RemovableHandle] = [_attach(block, scale) for block in blocks] if scale != 1 else []

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class BranchScaling(Scaling):
    """The test-time scale of some blocks: folded into weights where possible, by hooks elsewhere.

    Args:
        blocks: the partitioned blocks.
        scale: the factor.
    """

    def __init__(self, blocks: Sequence[Block], scale: float) -> None:
        self.scale = scale
        self._blocks = blocks
        self._hooks = ScaleHooks([], 1.0)

    @override
    def apply(self) -> dict[str, Tensor]:
        originals = fold(self._blocks, self.scale) if self.scale != 1 else {}
        self._hooks.remove()
        self._hooks = ScaleHooks([block for block in self._blocks if not foldable(block)], self.scale)
        return originals

    @override
    def take_off(self) -> None:
        self._hooks.remove()

    @override
    def tensors(self) -> dict[str, Tensor]:
        return folded(self._blocks)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "blocks": [block.name for block in self._blocks],
            "hooked": [block.name for block in self._blocks if not foldable(block)],
        }

    @override
    def undo(self, state: Mapping[str, Any], only: Collection[str] | None) -> None:
        # The saved model may have partitioned other blocks: those are left as they are.
        if state["scale"] != 1:
            blocks = [block for block in self._blocks if block.name in state["blocks"]]
            unfold(blocks, state["scale"], state["originals"], only)


def remove_scale_hooks(module: nn.Module) -> None:
    """Remove all hooks that scale blocks of ``module``, or of the module that it is a copy of."""
    for child in module.modules():
        for key in [key for key, hook in child._forward_hooks.items() if isinstance(hook, ScaleHook)]:
            del child._forward_hooks[key]
            child._forward_hooks_with_kwargs.pop(key, None)


def _attach(block: Block, scale: float) -> RemovableHandle:
    if block.branch_end is not None:  # the branch itself can be scaled, without its input
        branch = block.module.get_submodule(block.branch_end)
        return branch.register_forward_hook(ScaleHook(scale, None), with_kwargs=True)
    hook = ScaleHook(scale, first_argument(block.module))
    return block.module.register_forward_hook(hook, with_kwargs=True)


def _last_layer(block: Block) -> dict[str, Tensor]:
    """Weight and bias of the branch's last layer, by name; empty if it is not known to be linear in them."""
    if block.branch_end is None:
        return {}
    layer = block.module.get_submodule(block.branch_end)
    if type(layer) not in _LINEAR_IN_WEIGHT and type(layer).__name__ not in _LINEAR_BY_NAME:
        return {}
    own: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if "weight" not in own:
        return {}
    return {f"{block.name}.{block.branch_end}.{name}": own[name] for name in ("weight", "bias") if name in own}
