"""Checks in the first forward of each block that it is residual, and finds where its branches end.

The list of a block's layers does not show this. So its input and output are compared in its first call, and it is
called once more on random numbers with all weights at zero: a residual block then returns its input, whatever its
branch computes; an MLP without a skip connection, a chain of convolutions or a pooling layer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import Block, BranchEnd
from resist_lightning.methods.resist.branches import find_branch_ends
from resist_lightning.methods.resist.bypass import (
    Bypass,
    by_path,
    first_argument,
    input_of,
    output_form,
    refuse_compiled,
    signature,
)
from resist_lightning.methods.resist.folding import foldable
from resist_lightning.methods.resist.identity import is_residual, norms_among_others
from resist_lightning.methods.resist.network import choice_without
from resist_lightning.methods.resist.runs import NotSeenError
from resist_lightning.methods.resist.trial import copied, trial, two_samples, zero_weights
from resist_lightning.state.compiled import is_exporting, uncompiled
from resist_lightning.state.random_state import random_numbers_apart


class FirstForward:
    """Checks the first forward of each block on every worker, by hooks that remove themselves.

    Absent blocks are checked too, with weights of zero: all workers refuse a wrong shape, data type or tuple in the
    first step. Whether a block is residual, and where its branches end, shows only where it is present;
    :meth:`BlockLayout.agree` tells the ends to the other workers. Findings are noted in :attr:`Block.seen`.

    Args:
        blocks: all blocks, with their own forwards.
        network: the network that they are in, for errors that name other blocks; None if it is not known.
    """

    def __init__(self, blocks: Sequence[Block], network: nn.Module | None = None) -> None:
        known: dict[Any, tuple[BranchEnd, ...]] = {}

        def way_out(block: Block) -> str:
            return "" if network is None else choice_without(block, blocks, network)

        self._looks = [_Look(block, known, partial(way_out, block)) for block in blocks]

    def remove(self) -> None:
        """Remove the hooks."""
        for look in self._looks:
            look.remove()


class _Look:
    """The check of one block.

    Args:
        block: the block.
        known: the branch ends of blocks that were checked, by their kind; shared by all checks.
        way_out: gives a sentence for errors that names the blocks to choose instead.
    """

    def __init__(self, block: Block, known: dict[Any, tuple[BranchEnd, ...]], way_out: Callable[[], str]) -> None:
        module = block.module
        self._block = block
        self._way_out = way_out
        self._known = known
        self._argument = first_argument(module)
        self._signature = signature(module)
        self._body = getattr(module, "_orig_mod", module)  # the module that torch.compile wraps
        self._prefix = "" if self._body is module else "_orig_mod."
        self._forward: Callable[..., Any] = self._body.forward
        if not foldable(block):
            block.seen.called = False
        block.compiled.hold_back("not seen")
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Remove the hooks, and restore compiled code."""
        self._block.compiled.release("not seen")
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_exporting():  # refused elsewhere, if this worker has only a part
            return
        if torch.compiler.is_compiling():
            refuse_compiled(self._block.name)
        self._block.seen.called = True
        x = input_of(self._block.name, self._argument, args, kwargs)
        if x.is_nested:  # nn.TransformerEncoder makes it of padded sequences, in evaluation; the next call is checked
            return
        if any(isinstance(child, torch.jit.ScriptModule) for child in self._body.modules()):
            return
        # Dropout in the block must draw the same numbers in training as without this; and modules that are compiled
        # inside of the block would be compiled again for other weights.
        with random_numbers_apart(), uncompiled(self._body):
            self._find_ends(x, args, kwargs)
            self._try(x, args, kwargs)

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = input_of(self._block.name, self._argument, args, kwargs)
        if not x.is_nested:
            self._compare(x, output)
            self.remove()

    def _find_ends(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find where the residual branches of a present block end, unless the scale folds anyway."""
        seen = self._block.seen
        if not self._present():
            return
        if seen.assumed:  # the code may have changed since the checkpoint
            seen.ends, seen.assumed = None, False
        if seen.ends is not None or foldable(self._block):
            return
        kind = _kind(self._body)
        hint = self._known.get(kind)
        ends = () if hint == () else self._ends_of_kind(x, args, kwargs, hint or ())
        # Blocks of a kind are not searched again if one failed: a search takes some twenty forwards of the block.
        if not hint:
            self._known[kind] = ends
        seen.ends = tuple(_prefixed(end, self._prefix) for end in ends)

    def _ends_of_kind(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], hint: Sequence[BranchEnd]
    ) -> tuple[BranchEnd, ...]:
        """The ends, found with two samples of the batch where these are enough, else with all."""
        inputs = [(x, args, kwargs)]
        small = two_samples(x, args, kwargs)
        if small is not None:
            inputs.insert(0, small)
        # Some kernels, of attention for example, are for 16 bits only.
        for dtype in dict.fromkeys((torch.float32, self._own_dtype(x))):
            for given in inputs:
                try:
                    return self._ends_for(*given, hint, dtype)
                except Exception as error:  # noqa: BLE001 - the user's code, given unexpected arguments
                    self._block.seen.why = f"{type(error).__name__}: {error}".splitlines()[0]
                    unseen = isinstance(error, NotSeenError)
            if unseen:
                break
        return ()

    def _own_dtype(self, x: Tensor) -> torch.dtype:
        """The data type that the block computes in."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

    def _ends_for(
        self,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hint: Sequence[BranchEnd],
        dtype: torch.dtype,
    ) -> tuple[BranchEnd, ...]:
        def find(*, everywhere: bool) -> tuple[BranchEnd, ...]:
            def call(value: Tensor) -> Any:
                others, named = self._arguments(value, args, kwargs, dtype, everywhere=everywhere)
                return self._forward(*others, **named)

            return find_branch_ends(self._body, x, call, hint, dtype)

        ends = find(everywhere=False)
        if not ends and sum(leaf is x for leaf in tree_leaves((args, kwargs))) > 1:
            ends = find(everywhere=True)
        for end in ends:
            for name in (*end.tensors, *end.divided):
                if f"{self._prefix}{name}" in self._block.not_own:
                    raise ValueError(f"{name} is not of this block alone")  # each block would scale it
        return ends

    def _try(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the block on random numbers with weights of zero; a forward that raises then is not judged."""
        generator = torch.Generator(x.device).manual_seed(0)
        inputs = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for _ in range(2)]
        try:
            with trial(self._body, x.device, zero_weights):
                given = [value.clone() for value in inputs]
                arguments = [self._arguments(value, args, kwargs) for value in given]
                outputs = [self._forward(*others, **named) for others, named in arguments]
                norms = norms_among_others(self._body)
                if not isinstance(outputs[0], Tensor):
                    self._block.seen.output = output_form(outputs, by_path(self._signature, *arguments[0]))
                tensors = [self._tensor_in(output) for output in outputs]
                residual = all(isinstance(value, Tensor) for value in tensors) and is_residual(inputs, tensors, norms)
        except Exception:  # noqa: BLE001 - the user's code, given unexpected arguments
            return
        # Outside of the `try`: these errors are for the user.
        self._compare(x, outputs[0])
        if not self._present() or foldable(self._block) or self._block.branch_end is not None:
            return
        if given[0]._version > 0:
            raise BlockSelectionError(
                f"block {self._block.name!r} ({type(self._block.module).__name__}) writes into its input (x += ..., "
                "inplace=True), but its residual branch is scaled with that input, as x + s (block(x) - x). Write x = "
                f"x + ... instead, leave the block out of `blocks`{self._way_out()}, or declare `residual_branch_end` "
                "in its class (docs/adding-a-model.md)."
            )
        if not residual:
            raise BlockSelectionError(
                f"block {self._block.name!r} ({type(self._block.module).__name__}) is not residual: with its weights "
                "at zero it does not return its input (nor an activation or a norm of it), so leaving it out is not "
                f"the identity. Leave it out of `blocks`{self._way_out()}; if its caller adds the input, move that sum "
                "into its forward; if it adds a residual itself, declare `residual_branch_end` in its class "
                "(docs/adding-a-model.md)."
            )

    def _arguments(
        self,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None = None,
        *,
        everywhere: bool = True,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with another input, and copies of all others.

        Args:
            x: the other input.
            args: the arguments by position.
            kwargs: the arguments by name.
            dtype: data type of the copies; None for their own.
            everywhere: whether ``x`` also stands where the input is passed again, as a shortcut for example.
        """
        given = args[0] if args else kwargs[self._argument]
        leaves, structure = tree_flatten((args, kwargs))
        own = [x if everywhere and leaf is given else copied(leaf, dtype) for leaf in leaves]
        others, named = tree_unflatten(own, structure)
        if args:
            return (x, *others[1:]), named
        return (), {**named, self._argument: x}

    def _present(self) -> bool:
        # Asked of the forward, not of the tensors: a simulated worker has the tensors of absent blocks too.
        return not isinstance(vars(self._block.module).get("forward"), Bypass)

    def _tensor_in(self, output: Any) -> Any:
        """The tensor in an output whose place the input takes while the block is absent."""
        return output if self._block.seen.output is None else tree_flatten(output)[0][0]

    def _compare(self, x: Tensor, output: Any) -> None:
        name = self._block.name
        value = self._tensor_in(output)
        if not isinstance(value, Tensor):
            raise BlockSelectionError(
                f"block {name!r} returns a {type(output).__name__} with values that it computes itself, but a block "
                "that is left out can only return its input, and pass on other arguments. Return the tensor alone, or "
                f"leave the block out of `blocks`{self._way_out()}."
            )
        if value.shape != x.shape:
            raise BlockSelectionError(
                f"block {name!r} changes the shape of its input from {tuple(x.shape)} to {tuple(value.shape)}, so "
                f"leaving it out is not the identity. Leave it out of `blocks`{self._way_out()}."
            )
        casts = torch.is_autocast_enabled(x.device.type) and value.is_floating_point()
        if value.dtype != x.dtype and not casts:
            raise BlockSelectionError(
                f"block {name!r} changes the data type of its input from {x.dtype} to {value.dtype}, so leaving it "
                "out is not the identity. Return the data type of the input, or leave the block out of "
                f"`blocks`{self._way_out()}."
            )


def _prefixed(end: BranchEnd, prefix: str) -> BranchEnd:
    module = None if end.module is None else prefix + end.module
    tensors, divided = (tuple(prefix + name for name in names) for names in (end.tensors, end.divided))
    return BranchEnd(tensors, module, divided)


def _kind(body: nn.Module) -> Any:
    """A key that is the same for blocks of one class with tensors of the same names and shapes."""
    tensors = [*body.named_parameters(), *body.named_buffers()]
    return type(body), tuple((name, tensor.shape) for name, tensor in tensors)
