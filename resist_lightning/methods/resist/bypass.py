"""The forward of an absent block: returns the input, by whatever name it is passed, in the form of the output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import Seen
from resist_lightning.state.compiled import is_exporting


def first_argument(module: nn.Module) -> str:
    """Name of the first argument of a module's forward, which is its input; empty for ``*args``."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = next(iter(signature(module).parameters.values()), None)
    return first.name if first is not None and first.kind in named else ""


def signature(module: nn.Module) -> inspect.Signature:
    """The signature of a module's forward; of the wrapped one's where torch.compile wraps it, and takes anything."""
    return inspect.signature(getattr(module, "_orig_mod", module).forward)


@dataclass(frozen=True)
class OutputForm:
    """The form of a block's output, a tuple for example, by which it is made while the block is absent.

    Its first tensor is the input. Each other value is one of the arguments, passed on (the position bias of T5), or
    the same in every call.

    Args:
        structure: structure of the output.
        arguments: for each value after the first, its path among the arguments by name; None if it is a constant.
        constants: for each value after the first, the constant; None if it is an argument.
    """

    structure: TreeSpec
    arguments: tuple[str | None, ...]
    constants: tuple[Any, ...]

    def make(self, x: Tensor, given: Mapping[str, Any]) -> Any:
        """The output for an input and the arguments of :func:`by_path`; None for a value that is not among them."""
        values = [
            constant if path is None else given.get(path)
            for path, constant in zip(self.arguments, self.constants, strict=True)
        ]
        return tree_unflatten([x, *values], self.structure)


def output_form(outputs: Sequence[Any], given: Mapping[str, Any]) -> OutputForm | None:
    """The form of a block's output; None if a value of it is computed by the block.

    Args:
        outputs: outputs of two calls with different inputs and the same other arguments; not a tensor alone.
        given: the arguments of the first call, from :func:`by_path`.
    """
    leaves, structure = tree_flatten(outputs[0])
    others = tree_flatten(outputs[1])[0]
    if len(others) != len(leaves) or not leaves or not isinstance(leaves[0], Tensor):
        return None
    paths = {id(value): path for path, value in given.items() if isinstance(value, Tensor)}
    arguments: list[str | None] = []
    constants: list[Any] = []
    for value, other in zip(leaves[1:], others[1:], strict=True):
        path = paths.get(id(value))
        if path is None and (isinstance(value, Tensor) or not _equal(value, other)):
            return None
        arguments.append(path)
        constants.append(None if path is not None else value)
    return OutputForm(structure, tuple(arguments), tuple(constants))


def by_path(of: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All values in the arguments of a forward by their paths, whether they are passed by position or by name."""
    by_name = dict(of.bind(*args, **kwargs).arguments)
    return {keystr(path): value for path, value in tree_flatten_with_path(by_name)[0]}


def _equal(value: Any, other: Any) -> bool:
    return isinstance(value, bool | int | float | str | type(None)) and type(value) is type(other) and value == other


class Bypass:
    """Stands in for the forward of an absent block, and returns its input, in the form of the block's output.

    A present block returns a new tensor. A network that writes into it in place would, where the block is absent,
    overwrite the block's input, which a long skip may still need: such a network gets a copy of the input.

    Args:
        name: the block's name, for messages.
        module: the block, with its own forward.
        seen: findings of its first forward.
        written: whether the network writes into the block's output; None if the first local step shall tell.

    Attributes:
        written: the same, or the finding of the first local step.
    """

    def __init__(self, name: str, module: nn.Module, seen: Seen, written: bool | None = None) -> None:
        self.written = written
        self._seen = seen
        self._name = name
        self._argument = first_argument(module)
        self._signature = signature(module)
        self._copies: list[Tensor] = []  # those returned until `written` is known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input, or a copy of it, and the block's other return values.

        Raises:
            BlockSelectionError: if the input is not a floating tensor, or the network was compiled as a whole, or calls
                the block's forward past its hooks.
        """
        if torch.compiler.is_compiling() and not is_exporting():
            refuse_compiled(self._name)
        if self._seen.called is False:
            raise BlockSelectionError(
                f"block {self._name!r} is called as block.forward(x), past its hooks, so it cannot be checked, nor its "
                "branches be scaled in the full model. Call the block itself: block(x); or leave it out of `blocks`."
            )
        x = self._safe(input_of(self._name, self._argument, args, kwargs))
        form: OutputForm | None = self._seen.output
        return x if form is None else form.make(x, by_path(self._signature, args, kwargs))

    def _safe(self, x: Tensor) -> Tensor:
        """The input, or a copy where the network may write into it."""
        if self.written is False:
            return x
        copy = x.clone()
        if self.written is None and not copy.is_inference():
            self._copies.append(copy)
        return copy

    def settle(self) -> None:
        """Called after a local step: check whether the network has written into the returned copies."""
        if self._copies:
            self.written = any(copy._version > 0 for copy in self._copies)
            self._copies = []


def compiled_as_a_whole(blocks: str, where: str) -> BlockSelectionError:
    """The error that blocks lie in code that is compiled as a whole."""
    return BlockSelectionError(
        f"{blocks} lies in {where}, which torch.compile has compiled as a whole: a new partition would compile it "
        "again, and after eight of them it would run uncompiled. Compile partitioned blocks one by one, in place: `for "
        "block in blocks: block.compile()`, and other parts as you like (docs/precision-and-speed.md)."
    )


@torch.compiler.disable(reason="it contains a partitioned block: use block.compile()")  # type: ignore[untyped-decorator]
def refuse_compiled(block: str) -> NoReturn:
    """Raise, in code that is being compiled, the error that a partitioned block lies in it."""
    raise compiled_as_a_whole(f"block {block!r}", "code")


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
        "that is left out returns its first argument, so that must be a floating-point tensor. Leave the block out of "
        "`blocks`, or give its forward the input first."
    )


def is_continuous(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a floating-point or complex tensor."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
