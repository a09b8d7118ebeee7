"""The forward of an absent block: it returns its input, by whatever name that is passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from resist_lightning.errors import BlockSelectionError


def first_argument(module: nn.Module) -> str:
    """Name of the first argument of a module's forward, which is its input; empty for ``*args``."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    return first.name if first is not None and first.kind in named else ""


class Bypass:
    """Stands in for the forward of an absent block, and returns its input.

    Args:
        name: the block's, for messages.
        module: the block, with its own forward.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._argument = first_argument(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input.

        Raises:
            BlockSelectionError: if it is not a tensor.
        """
        return input_of(self._name, self._argument, args, kwargs)


def input_of(block: str, argument: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input in the arguments of a block's forward.

    Args:
        block: the block's name.
        argument: see :func:`first_argument`.
        args: the arguments by position.
        kwargs: the arguments by name.

    Raises:
        BlockSelectionError: if it is not a floating tensor.
    """
    given: Any = args[0] if args else kwargs.get(argument)
    # Token ids, for example, can never be a block's output.
    if is_continuous(given):
        return given
    what = str(given.dtype) if isinstance(given, Tensor) else f"a {type(given).__name__}"
    raise BlockSelectionError(
        f"block {block!r} is called with {what} as its first argument{f' ({argument})' if argument else ''}; a block "
        "that is left out gives back its first argument, so that must be a floating tensor. Leave the block out of "
        "`blocks`, or give its forward the input first."
    )


def is_continuous(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
