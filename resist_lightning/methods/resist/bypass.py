"""What an absent block does: it gives back its input, wherever that is among the arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from resist_lightning.errors import BlockSelectionError


def first_argument(module: nn.Module) -> str:
    """Name of the first argument of a module's forward, its input; empty if it has none of a name."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    return first.name if first is not None and first.kind in named else ""


class Bypass:
    """What an absent block does in the place of its forward: it gives back its input.

    Args:
        name: of the block, for messages.
        module: the block, with its own forward.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._argument = first_argument(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The input, wherever it is among the arguments.

        Raises:
            BlockSelectionError: if it is not a tensor.
        """
        return input_of(self._name, self._argument, args, kwargs)


def input_of(block: str, argument: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a block that is called so.

    Args:
        block: its name.
        argument: see :func:`first_argument`.
        args: what it is called with by position.
        kwargs: what it is called with by name.

    Raises:
        BlockSelectionError: if it is not a floating tensor.
    """
    given: Any = args[0] if args else kwargs.get(argument)
    if is_continuous(given):
        return given
    what = str(given.dtype) if isinstance(given, Tensor) else f"a {type(given).__name__}"
    raise BlockSelectionError(
        f"block {block!r} is called with {what} as its first argument{f' ({argument})' if argument else ''}; a block "
        "that is left out gives back its first argument, so that must be a floating tensor. Leave the block out of "
        "`blocks`, or give its forward the input first."
    )


def is_continuous(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor of numbers that have gradients."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
