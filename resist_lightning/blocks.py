"""Which residual blocks of a network are partitioned.

A block can be partitioned if it adds a residual and keeps its input's shape, so that leaving it out is the identity.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist_lightning.config import BlockChoice
from resist_lightning.errors import BlockSelectionError
from resist_lightning.globs import matches
from resist_lightning.shapes import has_stride, keeps_shape, projection, why_not

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
        keeps_shape: whether input and output seem to have the same shape, judged without running it; the first
            forward will tell (:mod:`resist_lightning.residual`).
    """

    name: str
    module: nn.Module
    branch_end: str | None
    keeps_shape: bool

    @property
    def section(self) -> str:
        """Name of the container, which holds the blocks of one resolution."""
        return self.name.rpartition(".")[0]

    @property
    def network(self) -> str:
        """Name of what contains the sections of one network."""
        return self.section.rpartition(".")[0]

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
        return Block(name, module, declared, projection(module) is None and not has_stride(module))
    for base in type(module).__mro__:
        if base.__name__ in _KNOWN_BLOCKS and _KNOWN_FAMILIES.match(base.__module__):
            unchanged = type(module).forward is base.__dict__.get("forward") and getattr(module, "se", None) is None
            branch_end = "bn3" if hasattr(module, "bn3") else "bn2"
            return Block(name, module, branch_end if unchanged else None, keeps_shape(module))
    return None


def block_at(name: str, module: nn.Module) -> Block:
    """``module`` as a block of this name, whether its class is recognised or not."""
    return recognise(name, module) or Block(name, module, None, keeps_shape(module))


def select_blocks(
    module: nn.Module, choice: BlockChoice = None, trained: Collection[int] | None = None
) -> tuple[Block, ...]:
    """Choose the blocks to partition.

    What a network computes that nothing trains (a teacher, a moving average) must not depend on the worker: of several
    networks only those that train are partitioned.

    Args:
        module: the user's module.
        choice: None for the paper's rule (section 3.1: the third section without its first block), a glob or a list
            of globs that match the last parts of a module's name (``"layer3.*"``), a predicate of (name, module), or
            an empty list for none. Of what a glob with a wildcard matches, blocks that seem to change the shape, single
            layers and chains of them stay shared.
        trained: ids of the parameters that optimizers have; None if they are not known yet.

    Returns:
        The blocks, in the order of the network.

    Raises:
        BlockSelectionError: if nothing qualifies, a glob matches nothing, a block that changes the shape or a single
            layer is asked for, a block lies in another one, or its parameters are used elsewhere too.
    """
    if choice is None:
        blocks = _paper_rule(module, trained)
    elif callable(choice) and not isinstance(choice, str):
        blocks = [block_at(name, child) for name, child in module.named_modules() if name and choice(name, child)]
        if not blocks:
            raise BlockSelectionError(f"the predicate given as `blocks` chose nothing. {candidates(module)}")
        _refuse_others(blocks, module)
    else:
        blocks = _by_globs(module, _patterns(choice), trained)
    _refuse_nesting(blocks)
    _refuse_tied(module, blocks)
    for block in blocks:
        names = scripted(block.module)
        if names:
            raise BlockSelectionError(
                f"block {block.name!r} is TorchScript (at {f'{block.name}.{names[0]}'.rstrip('.')!r}): its compiled "
                "forward cannot be left out, and goes on with memory that was given away. Build the network without "
                "torch.jit, and script it after the training; or leave the block out of `blocks`."
            )
    return tuple(blocks)


def scripted(module: nn.Module) -> list[str]:
    """Names of the submodules that are TorchScript."""
    return [name for name, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule)]


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


def left_out(module: nn.Module, choice: BlockChoice, trained: Collection[int] | None = None) -> tuple[str, ...]:
    """Names of what a glob matches, and that stays shared because it does not qualify."""
    if choice is None or (callable(choice) and not isinstance(choice, str)):
        return ()
    patterns = _patterns(choice)
    chosen = {block.name for block in _by_globs(module, patterns, trained)}
    matched = [block.name for pattern in patterns for block in _matching(module, pattern)]
    return tuple(name for name in dict.fromkeys(matched) if name not in chosen)


def untrained(module: nn.Module, blocks: Iterable[Block], trained: Collection[int] | None = None) -> list[Block]:
    """Those of some blocks in whose network nothing trains now; see :func:`select_blocks`."""
    blocks = list(blocks)
    networks = {block.network for block in blocks}
    still = {name for name in networks if not _trains(module.get_submodule(name), trained)}
    return [block for block in blocks if block.network in still]


def _trains(network: nn.Module, trained: Collection[int] | None) -> bool:
    return any(p.requires_grad and (trained is None or id(p) in trained) for p in network.parameters())


def _paper_rule(module: nn.Module, trained: Collection[int] | None) -> list[Block]:
    sections: dict[str, dict[str, list[Block]]] = defaultdict(lambda: defaultdict(list))
    for block in find_blocks(module):
        sections[block.network][block.section].append(block)
    chosen: list[Block] = []
    for network in sections.values():
        third = list(network.values())[2:3]
        chosen.extend(block for section in third for block in section[1:] if block.keeps_shape)
    still = untrained(module, chosen, trained)
    if still and len(still) == len(chosen):
        raise BlockSelectionError(
            f"nothing trains in the network of {summary([block.name for block in still])}, so its blocks stay shared, "
            "and no others qualify by the paper's rule. If it will be trained later, say so by naming them: "
            f"blocks={[block.name for block in still][:1]}."
        )
    if not chosen:
        raise BlockSelectionError(
            "no block qualifies by the paper's rule (the third section without its first block); choose with "
            f"`blocks=`. {candidates(module)}"
        )
    return [block for block in chosen if block not in still]


def _patterns(choice: str | Sequence[str]) -> list[str]:
    return [choice] if isinstance(choice, str) else list(choice)


def _matching(module: nn.Module, pattern: str) -> list[Block]:
    """What a glob means: blocks that are recognised, or, where there is none, any module."""
    matched = [(name, child) for name, child in module.named_modules() if name and matches(pattern, name)]
    known = [block for block in (recognise(name, child) for name, child in matched) if block is not None]
    return known or [block_at(name, child) for name, child in matched]


def _by_globs(module: nn.Module, patterns: Sequence[str], trained: Collection[int] | None) -> list[Block]:
    chosen: dict[str, Block] = {}
    for pattern in patterns:
        blocks = _matching(module, pattern)
        if not blocks:
            raise BlockSelectionError(f"blocks={pattern!r} matches nothing. {candidates(module)}")
        possible = [block for block in blocks if why_not(block.module) is None]
        if not possible:
            _refuse_others(blocks, module)
        keeping = [block for block in possible if block.keeps_shape] or possible
        chosen.update((block.name, block) for block in keeping)
    still = untrained(module, chosen.values(), trained)
    if len(still) < len(chosen):
        chosen = {name: block for name, block in chosen.items() if block not in still}
    order = {name: position for position, (name, _) in enumerate(module.named_modules())}
    return sorted(chosen.values(), key=lambda block: order[block.name])


def _refuse_others(blocks: Iterable[Block], module: nn.Module) -> None:
    for block in blocks:
        reason = why_not(block.module)
        if reason is not None:
            raise BlockSelectionError(
                f"block {block.name!r} {reason}, so leaving it out is not the identity; it must stay shared. "
                f"{candidates(module)}"
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
