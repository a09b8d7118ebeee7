"""The forward of an absent block: it returns its input, by whatever name that is passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from resist_lightning.errors import BlockSelectionError


def first_argument(module: nn.Module) -> str:
    """Name of the first argument of a module's forward, which is its input; empty for ``*args``."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    return first.name if first is not None and first.kind in named else ""


class Bypass:
    """Stands in for the forward of an absent block, and returns its input.

    A present block returns a new tensor. A network that writes into it in place would, where the block is absent,
    overwrite the block's input, which a long skip may still need: such a network gets a copy of the input.

    Args:
        name: the block's, for messages.
        module: the block, with its own forward.
        written: whether the network writes into the block's output; None if the first local step shall tell.

    Attributes:
        written: the same, and what the first local step told.
    """

    def __init__(self, name: str, module: nn.Module, written: bool | None = None) -> None:
        self.written = written
        self._name = name
        self._argument = first_argument(module)
        self._copies: list[Tensor] = []  # what was returned until it is known

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input, or a copy of it.

        Raises:
            BlockSelectionError: if it is not a tensor.
        """
        x = input_of(self._name, self._argument, args, kwargs)
        if torch.compiler.is_compiling():
            return x.clone()  # versions are not seen there; the compiler leaves out copies that nobody writes into
        if self.written is False:
            return x
        copy = x.clone()
        if self.written is None and not copy.is_inference():
            self._copies.append(copy)
        return copy

    def settle(self) -> None:
        """Called after a local step: look whether the network has written into what was returned."""
        if self._copies:
            self.written = any(copy._version > 0 for copy in self._copies)
            self._copies = []


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
