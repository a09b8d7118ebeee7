"""Chooses the residual blocks of a network that are partitioned: by default, by names or by a predicate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.globs import matches, summary
from resist_lightning.methods.residual import (
    Block,
    block_at,
    candidates,
    find_blocks,
    parameters_of,
    recognise,
    scripted,
    untrained,
    why_not,
)
from resist_lightning.methods.resist.config import BlockChoice
from resist_lightning.methods.resist.identity import kind_of, residual_only
from resist_lightning.methods.resist.short_globs import short_globs
from resist_lightning.methods.resist.structure import repeated_blocks, sections
from resist_lightning.methods.tracing import names_of_tensors

PARTITIONED = 0.5
"""Share of the parameters in partitioned blocks from which on two workers hold at most three quarters each."""

_CLOSE = 0.05
"""A later choice is not worth it if it partitions only this share more."""

ONLY_LOOKING = (
    "look residual, but do not return their input with their weights at zero, so leaving them out is not the identity"
)
_OTHER_STRATEGIES = "'ist' deals out hidden neurons, 'auxnet' cuts by depth, 'local_sgd' divides nothing"


def select_blocks(
    module: nn.Module, choice: BlockChoice = None, trained: Collection[int] | None = None
) -> tuple[Block, ...]:
    """Choose the blocks to partition.

    Of several networks only those that train are partitioned: a teacher must compute the same on all workers.

    Args:
        module: the user's module.
        choice: None for the default (:func:`_default_choice`), a glob or a list of globs that match the last parts of
            a module's name (``"layer3.*"``), a predicate of (name, module), or an empty list for none. Of several
            matches of a glob, blocks that seem to change the shape, single layers and chains of them stay shared.
        trained: ids of the parameters that optimizers have; None if they are not known yet.

    Returns:
        The blocks, in the order of the network.

    Raises:
        BlockSelectionError: if nothing qualifies, a glob matches nothing, a block that changes the shape or a single
            layer is asked for, a block lies in another one, or its parameters are used elsewhere too.
    """
    if choice is None:
        blocks = _default_choice(module, trained)
    elif callable(choice) and not isinstance(choice, str):
        blocks = [block_at(name, child) for name, child in module.named_modules() if name and choice(name, child)]
        if not blocks:
            raise BlockSelectionError(f"the predicate given as `blocks` chose nothing. {candidates(module)}")
        _refuse_others(blocks, module)
    else:
        blocks = _by_globs(module, _patterns(choice), trained)
    # Each of these cases would send a tensor twice, or leave a part of a block behind.
    _refuse_nesting(blocks)
    names_by_id = names_of_tensors(module)
    _refuse_tied(blocks, names_by_id)
    for block in blocks:
        names = scripted(block.module)
        if names:
            raise BlockSelectionError(
                f"block {block.name!r} is TorchScript (at {f'{block.name}.{names[0]}'.rstrip('.')!r}): its compiled "
                "forward cannot be left out, and would keep using memory that a worker frees. Build the network "
                "without torch.jit, and script it after the training; or leave the block out of `blocks`."
            )
    return tuple(replace(block, not_own=_not_own(block, names_by_id)) for block in blocks)


def left_out(module: nn.Module, choice: BlockChoice, trained: Collection[int] | None = None) -> tuple[str, ...]:
    """Names of modules that match a glob, or that the default would choose, but stay shared as they do not qualify."""
    if choice is None:
        names = names_of_tensors(module)
        return tuple(block.name for block in repeated_blocks(module) if _tied_names(block, names))
    if callable(choice) and not isinstance(choice, str):
        return ()
    patterns = _patterns(choice)
    chosen = {block.name for block in _by_globs(module, patterns, trained)}
    matched = [block.name for pattern in patterns for block in _matching(module, pattern)]
    return tuple(name for name in dict.fromkeys(matched) if name not in chosen)


def only_look_residual(module: nn.Module) -> list[str]:
    """Names of the candidates that the default leaves out, as a trial shows that they are not residual."""
    looking = repeated_blocks(module)
    residual = residual_only(looking)
    return [block.name for block in looking if block not in residual]


def default_choices(module: nn.Module, trained: Collection[int] | None = None) -> tuple[list[Block], ...]:
    """The choices that the default is taken from, in their order: each may be empty.

    The paper's (section 3.1: the third section of a ResNet without its first block, as first blocks change the shape);
    the blocks of all sections without the first of each; all blocks that keep the shape. Of networks that train only,
    and without blocks that have a tensor in common with other modules.
    """
    repeated = residual_only(repeated_blocks(module))
    without_first = [block for section in sections(tuple(repeated), module).values() for block in section]
    names = names_of_tensors(module)
    choices = []
    for blocks in (_paper_rule(module), without_first, repeated):
        still = untrained(module, blocks, trained)
        choices.append([block for block in blocks if block not in still and not _tied_names(block, names)])
    return tuple(choices)


def names_chosen(module: nn.Module, patterns: Sequence[str], trained: Collection[int] | None = None) -> list[str]:
    """Names of the blocks that globs choose; empty where they are refused."""
    try:
        return [block.name for block in _by_globs(module, patterns, trained)]
    except BlockSelectionError:
        return []


def choice_without(refused: Block, blocks: Sequence[Block], module: nn.Module) -> str:
    """Words for errors: the value of the option ``blocks`` without a block and all others of its kind."""
    kind = kind_of(refused.module)
    rest = [block.name for block in blocks if kind_of(block.module) != kind]
    if not rest:
        return f" (no other kind is among them; {_OTHER_STRATEGIES})"
    globs = short_globs(rest, lambda globs: names_chosen(module, globs))
    return f" (blocks={globs[0] if len(globs) == 1 else list(globs)!r} chooses all but its kind)"


def _default_choice(module: nn.Module, trained: Collection[int] | None) -> list[Block]:
    """The first of :func:`default_choices` with which two workers hold at most three quarters of the parameters each.

    If none of them reaches that, the first that comes close to the best.
    """
    choices = default_choices(module, trained)
    if not any(choices):
        # Both rules name some blocks; an error names each once, in the order of the network.
        by_name = {block.name: block for block in [*residual_only(repeated_blocks(module)), *_paper_rule(module)]}
        possible = list(by_name.values())
        _refuse_untrained(module, possible, trained)
        _refuse_tied(possible, names_of_tensors(module))
        others = only_look_residual(module)
        tried = f" {summary(others)} {ONLY_LOOKING}." if others else ""
        raise BlockSelectionError(
            f"no residual block that keeps the shape of its input was found; choose with `blocks=`.{tried} "
            f"{candidates(module)} Or take a strategy that needs no such blocks: {_OTHER_STRATEGIES}."
        )
    shares = [share_of(module, blocks) for blocks in choices]
    enough = min(PARTITIONED, max(shares) - _CLOSE)
    return next(blocks for blocks, share in zip(choices, shares, strict=True) if blocks and share >= enough)


def _paper_rule(module: nn.Module) -> list[Block]:
    sections: dict[str, dict[str, list[Block]]] = defaultdict(lambda: defaultdict(list))
    for block in find_blocks(module):
        sections[block.network][block.section].append(block)
    chosen: list[Block] = []
    for network in sections.values():
        if len(network) < 3:
            continue
        third = list(network.values())[2]
        chosen.extend(block for block in third[1:] if block.keeps_shape)
    return chosen


def _refuse_untrained(module: nn.Module, blocks: Sequence[Block], trained: Collection[int] | None) -> None:
    still = untrained(module, blocks, trained)
    if still:
        why = "it is frozen" if trained is None else "no optimizer has a trainable parameter of it"
        raise BlockSelectionError(
            f"nothing trains in the network of {summary([block.name for block in still])} ({why}), so its blocks stay "
            "shared, and no others qualify by default. If it will be trained later, say so by naming them: "
            f"blocks={[block.name for block in still][:1]}."
        )


def share_of(module: nn.Module, blocks: Sequence[Block]) -> float:
    """The share of a module's parameters that lies in some blocks."""
    total = sum(parameter.numel() for parameter in module.parameters())
    return sum(parameter.numel() for parameter in parameters_of(blocks)) / max(total, 1)


def _patterns(choice: str | Sequence[str]) -> list[str]:
    return [choice] if isinstance(choice, str) else list(choice)


def _matching(module: nn.Module, pattern: str) -> list[Block]:
    """The blocks that a glob selects: those that are recognised, or, where there is none, any module."""
    matched = [(name, child) for name, child in module.named_modules() if name and matches(pattern, name)]
    known: list[Block] = []
    for name, child in matched:
        block = recognise(name, child)
        if block is not None:
            known.append(block)
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
        # `keeps_shape` is a guess, so a glob that selects no block with it is taken at its word.
        keeping = [block for block in possible if block.keeps_shape] or possible
        chosen.update((block.name, block) for block in keeping)
    still = untrained(module, chosen.values(), trained)
    if len(still) < len(chosen):  # else the user has named them on purpose, and is warned
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
        for end in range(1, len(parts)):
            outer = ".".join(parts[:end])
            if outer in names:
                raise BlockSelectionError(f"block {name!r} lies in block {outer!r}; choose one of the two.")


def _refuse_tied(blocks: Sequence[Block], names: Mapping[int, Sequence[str]]) -> None:
    for block in blocks:
        tied = _tied_names(block, names)
        if tied:
            raise BlockSelectionError(
                f"block {block.name!r} shares a tensor under the names {', '.join(tied)} (tied weights); a block that "
                "is used twice cannot be handed over. Leave it out of `blocks`, or give each block tensors of its own."
            )


def _tied_names(block: Block, names: Mapping[int, Sequence[str]]) -> Sequence[str]:
    """The names of the first parameter that trains and has several, or of any if the block has none of its own.

    Empty if there is none. Frozen parameters and buffers with several names, such as those of rotary embeddings that
    all blocks use, stay shared.
    """
    own = parameters_of([replace(block, not_own=_not_own(block, names))])
    suspects = own or parameters_of([block])
    tied = (names[id(parameter)] for parameter in suspects if len(names[id(parameter)]) > 1)
    return next(tied, ())


def _not_own(block: Block, names: Mapping[int, Sequence[str]]) -> frozenset[str]:
    """Names, within a block, of the tensors that other modules have too and nothing trains."""
    tensors = named_tensors(block.module)
    return frozenset(
        name for name, tensor in tensors.items() if len(names[id(tensor)]) > 1 and not tensor.requires_grad
    )
