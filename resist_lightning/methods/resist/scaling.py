"""Scales the residual branches of partitioned blocks in the full model (section 3.2 of the paper).

In the full model all blocks are active at once, so each branch is multiplied by the probability that a block was held
in training. The factor is folded into the weights that end each branch, so that a checkpoint is a plain model: where
they are is known for some classes, and found for other blocks by running them (:mod:`.branches`). A block whose
branches could not be verified is scaled by a hook instead: x + s (block(x) - x).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from resist_lightning.methods.layout import Scaling
from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.bypass import first_argument
from resist_lightning.methods.resist.folding import Folded, fold, foldable, folded, last_layer, unfold
from resist_lightning.methods.resist.partition import Schedule


def coverage(schedule: Schedule) -> float:
    """The probability that a worker holds a block, after the warm-up."""
    return schedule.share(schedule.warmup_rounds)


class ScaleHook:
    """A forward hook that scales a residual branch.

    It may stay on the user's module, so it can be pickled, copied and exported with it.

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
        # Blocks may return a tuple, whose first tensor is the next block's input.
        (value, *others), structure = tree_flatten(output)
        if self.argument is None:
            scaled = value * self.scale
        else:
            x = args[0] if args else kwargs[self.argument]
            scaled = x + self.scale * (value - x)
        return tree_unflatten([scaled, *others], structure)


class ScaleHooks:
    """Scales residual branches while the network runs, without touching a weight.

    For rounds in which all workers hold all blocks, and for the full model where a scale cannot be folded.

    Args:
        blocks: the blocks to scale.
        scale: the factor.
        wait: whether blocks that have not been seen are hooked in their first forward, which shows their branches.
    """

    def __init__(self, blocks: Sequence[Block], scale: float, *, wait: bool = False) -> None:
        self._scale = scale
        self._handles: list[RemovableHandle] = []
        if scale == 1:
            return
        for block in blocks:
            if wait and block.seen.ends is None and not foldable(block):
                self._attach_when_seen(block)
            else:
                self.attach(block)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach_when_seen(self, block: Block) -> None:
        # It is called after the hook that checks the first forward, which was registered earlier.
        later = _WhenSeen(self, block)
        later.handle = block.module.register_forward_pre_hook(later)
        self._handles.append(later.handle)

    def attach(self, block: Block) -> None:
        """Hook one block."""
        ends = [end.module for end in block.seen.ends or ()]
        names = ends or [block.branch_end]
        if None in names:
            hook = ScaleHook(self._scale, first_argument(block.module))
            self._handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
            return
        # A branch itself can be scaled, without its input.
        for name in filter(None, names):
            branch = block.module.get_submodule(name)
            self._handles.append(branch.register_forward_hook(ScaleHook(self._scale, None), with_kwargs=True))


class _WhenSeen:
    """A forward pre-hook that hooks its block in the first forward, and is removed then.

    A copy of the module has it too, for the block of the original: there it does nothing.

    Args:
        hooks: attaches the hooks to the block.
        block: the block.
    """

    def __init__(self, hooks: ScaleHooks, block: Block) -> None:
        self.handle: RemovableHandle | None = None
        self._hooks = hooks
        self._block = block

    def __deepcopy__(self, memo: dict[int, Any]) -> _WhenSeen:
        return self

    @override
    def __reduce__(self) -> Any:
        return _Nothing, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Called by torch before the forward of the block, or of its copy."""
        if module is not self._block.module or self.handle is None:
            return
        handle, self.handle = self.handle, None
        handle.remove()
        self._hooks.attach(self._block)


class _Nothing:
    """A hook without effect, which a pickled :class:`_WhenSeen` becomes."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Do nothing."""


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
        # As of the last `apply`: a block may show where its branches end in the very evaluation that hooks it.
        self._folded: dict[str, Folded] = {}
        self._hooked: list[Block] = []

    @override
    def apply(self) -> dict[str, Tensor]:
        self._folded = folded(self._blocks) if self.scale != 1 else {}
        self._hooked = [block for block in self._blocks if not foldable(block)]
        self._hooks.remove()
        self._hooks = ScaleHooks(self._hooked, self.scale)
        return fold(self._folded, self.scale)

    @override
    def take_off(self) -> None:
        self._hooks.remove()

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {name: each.tensor for name, each in self._folded.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "blocks": [block.name for block in self._blocks],
            "hooked": [block.name for block in self._hooked],
            "folded": [name for name, each in self._folded.items() if not each.divided],
            "divided": [name for name, each in self._folded.items() if each.divided],
        }

    @override
    def tensors_of(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: each.tensor for name, each in self._folded_in(state).items()}

    def _folded_in(self, state: Mapping[str, Any]) -> dict[str, Folded]:
        """The tensors that a saved full model has folded its scale into."""
        if state["scale"] == 1:
            return {}
        # The saved model may have partitioned other blocks: those are left as they are.
        blocks = [block for block in self._blocks if block.name in state["blocks"]]
        if "folded" not in state:  # of a version that folded the ends of known classes only
            return {name: Folded(tensor) for block in blocks for name, tensor in last_layer(block).items()}
        divided = state.get("divided", ())
        names = {*state["folded"], *divided}
        tensors = {name: tensor for block in blocks for name, tensor in block.tensors().items()}
        return {name: Folded(tensors[name], name in divided) for name in tensors if name in names}

    @override
    def undo(self, state: Mapping[str, Any], only: Collection[str] | None) -> None:
        tensors = self._folded_in(state)
        chosen = {name: each for name, each in tensors.items() if only is None or name in only}
        unfold(chosen, state["scale"], state["originals"])


def remove_scale_hooks(module: nn.Module) -> None:
    """Remove all hooks that scale blocks of ``module``, or of the module that it is a copy of."""
    for child in module.modules():
        for key in [key for key, hook in child._forward_hooks.items() if isinstance(hook, ScaleHook)]:
            del child._forward_hooks[key]
            child._forward_hooks_with_kwargs.pop(key, None)
