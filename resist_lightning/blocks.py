"""Which residual blocks of a network are partitioned.

A block can be partitioned if it adds a residual and keeps its input's shape, so that leaving it out is the identity.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from resist_lightning.config import BlockChoice
from resist_lightning.errors import BlockSelectionError
from resist_lightning.globs import matches

_KNOWN_FAMILIES = re.compile(r"^(torchvision|timm)\.models\.resnet$")
_KNOWN_BLOCKS = ("BasicBlock", "Bottleneck")


@dataclass(frozen=True)
class Block:
    """A residual block.

    Args:
        name: its qualified name in the user's module.
        module: the block itself; its output is its input plus (or an activation of its input plus) a residual branch.
        branch_end: name of the submodule whose output is the residual branch, so that scaling its weight and bias
            scales the branch; None if unknown.
        keeps_shape: whether input and output have the same shape.
    """

    name: str
    module: nn.Module
    branch_end: str | None
    keeps_shape: bool

    @property
    def section(self) -> str:
        """Name of the container, which holds the blocks of one resolution."""
        return self.name.rpartition(".")[0]

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters, then its buffers, by qualified name."""
        own: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {f"{self.name}.{name}": tensor for name, tensor in own.items()}


def find_blocks(module: nn.Module) -> tuple[Block, ...]:
    """All residual blocks that are recognised: torchvision's, timm's, and modules with ``residual_branch_end``."""
    found = (recognise(name, child) for name, child in module.named_modules())
    return tuple(block for block in found if block is not None)


def recognise(name: str, module: nn.Module) -> Block | None:
    """The residual block that ``module`` is, or None.

    A class of one's own takes part by declaring ``residual_branch_end`` (see docs/adding-a-model.md).
    """
    declared = getattr(module, "residual_branch_end", None)
    if isinstance(declared, str):
        return Block(name, module, declared, _keeps_shape(module))
    for base in type(module).__mro__:
        if base.__name__ in _KNOWN_BLOCKS and _KNOWN_FAMILIES.match(base.__module__):
            unchanged = type(module).forward is base.__dict__.get("forward") and getattr(module, "se", None) is None
            branch_end = "bn3" if hasattr(module, "bn3") else "bn2"
            return Block(name, module, branch_end if unchanged else None, _keeps_shape(module))
    return None


def block_at(name: str, module: nn.Module) -> Block:
    """``module`` as a block of this name, whether its class is recognised or not."""
    return recognise(name, module) or Block(name, module, None, _keeps_shape(module))


def select_blocks(module: nn.Module, choice: BlockChoice = None) -> tuple[Block, ...]:
    """Choose the blocks to partition.

    Args:
        module: the user's module.
        choice: None for the paper's rule (section 3.1: the third section without its first block), a glob or a list
            of globs that match the last parts of a module's name (``"layer3.*"``), a predicate of (name, module), or
            an empty list for none. Of what a glob with a wildcard matches, blocks that change the shape stay shared.

    Returns:
        The blocks, in the order of the network.

    Raises:
        BlockSelectionError: if nothing qualifies, a glob matches nothing, a block that changes the shape is asked
            for, a block lies in another one, or its parameters are used elsewhere too.
    """
    if choice is None:
        blocks = _paper_rule(module)
    elif isinstance(choice, str):
        blocks = _by_globs(module, [choice])
    elif callable(choice):
        blocks = [block_at(name, child) for name, child in module.named_modules() if name and choice(name, child)]
        if not blocks:
            raise BlockSelectionError(f"the predicate given as `blocks` chose nothing. {candidates(module)}")
        _refuse_shape_changes(blocks, module)
    else:
        blocks = _by_globs(module, list(choice))
    _refuse_nesting(blocks)
    _refuse_tied(module, blocks)
    return tuple(blocks)


def candidates(module: nn.Module) -> str:
    """A sentence that lists the blocks that could be chosen."""
    names = [block.name for block in find_blocks(module) if block.keeps_shape]
    if not names:
        return (
            "No residual block was recognised in this model: name modules of your own by a glob, or declare "
            "`residual_branch_end` in the block's class."
        )
    return f"Blocks that can be partitioned: {summary(names)}."


def summary(names: Sequence[str]) -> str:
    """Names, with runs of numbered siblings shortened: ``layer3.1-22``."""
    runs: list[list[str]] = []
    for name in names:
        stem, _, index = name.rpartition(".")
        last_stem, _, last_index = runs[-1][-1].rpartition(".") if runs else ("", "", "")
        if (
            runs
            and stem == last_stem
            and index.isdecimal()
            and last_index.isdecimal()
            and int(index) == int(last_index) + 1
        ):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs)


def left_out(module: nn.Module, choice: BlockChoice) -> tuple[str, ...]:
    """Blocks that a glob matches but that stay shared because they change the shape."""
    if choice is None or (callable(choice) and not isinstance(choice, str)):
        return ()
    patterns = [choice] if isinstance(choice, str) else list(choice)
    blocks = find_blocks(module)
    return tuple(b.name for b in blocks if not b.keeps_shape and any(matches(p, b.name) for p in patterns))


def _paper_rule(module: nn.Module) -> list[Block]:
    sections: dict[str, dict[str, list[Block]]] = defaultdict(lambda: defaultdict(list))
    for block in find_blocks(module):
        sections[block.section.rpartition(".")[0]][block.section].append(block)
    chosen: list[Block] = []
    for network in sections.values():
        third = list(network.values())[2:3]
        chosen.extend(block for section in third for block in section[1:] if block.keeps_shape)
    if not chosen:
        raise BlockSelectionError(
            "no block qualifies by the paper's rule (the third section without its first block); choose with "
            f"`blocks=`. {candidates(module)}"
        )
    return chosen


def _by_globs(module: nn.Module, patterns: Sequence[str]) -> list[Block]:
    chosen: dict[str, Block] = {}
    for pattern in patterns:
        matched = [(name, child) for name, child in module.named_modules() if name and matches(pattern, name)]
        known = [block for block in (recognise(name, child) for name, child in matched) if block is not None]
        blocks = known or [block_at(name, child) for name, child in matched]
        if not blocks:
            raise BlockSelectionError(f"blocks={pattern!r} matches nothing. {candidates(module)}")
        keeping = [block for block in blocks if block.keeps_shape]
        if not keeping:
            _refuse_shape_changes(blocks, module)
        chosen.update((block.name, block) for block in keeping)
    order = {name: position for position, (name, _) in enumerate(module.named_modules())}
    return sorted(chosen.values(), key=lambda block: order[block.name])


def _keeps_shape(module: nn.Module) -> bool:
    """Judged without running it: no projection on the skip path, no stride, as many channels out as in."""
    if any(_is_projection(getattr(module, name, None)) for name in ("downsample", "shortcut")):
        return False
    layers = [child for child in module.modules() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    if any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(layer.stride) > 1 for layer in layers):
        return False
    return not layers or _width(layers[0], "in") == _width(layers[-1], "out")


def _is_projection(path: object) -> bool:
    return isinstance(path, nn.Module) and any(True for _ in path.parameters())


def _width(layer: nn.Module, side: str) -> object:
    return getattr(layer, f"{side}_channels", None) or getattr(layer, f"{side}_features", None)


def _refuse_shape_changes(blocks: Iterable[Block], module: nn.Module) -> None:
    for block in blocks:
        if not block.keeps_shape:
            raise BlockSelectionError(
                f"block {block.name!r} changes the shape of its input, so leaving it out is not the identity; it must "
                f"stay shared. {candidates(module)}"
            )


def _refuse_nesting(blocks: Sequence[Block]) -> None:
    names = {block.name for block in blocks}
    for name in names:
        parts = name.split(".")
        for outer in (".".join(parts[:end]) for end in range(1, len(parts))):
            if outer in names:
                raise BlockSelectionError(f"block {name!r} lies in block {outer!r}; choose one of the two.")


def _refuse_tied(module: nn.Module, blocks: Sequence[Block]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    everything = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in everything:
        names[id(tensor)].append(name)
    for block in blocks:
        for tensor in block.tensors().values():
            if len(names[id(tensor)]) > 1:
                raise BlockSelectionError(
                    f"block {block.name!r} shares a tensor under the names {', '.join(names[id(tensor)])} (tied "
                    "weights); a block that is used twice cannot be handed over. Leave it out of `blocks`, or register "
                    "the module once."
                )
