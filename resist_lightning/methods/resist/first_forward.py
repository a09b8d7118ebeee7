"""Checks in the first forward of each block that it is residual, so that leaving it out is the identity.

The list of a block's layers does not tell that. So its input and output are compared in its first call, and it is
called once more on random numbers with all weights at zero: a residual block then returns its input, whatever its
branch computes; an MLP without a skip connection, a chain of convolutions or a pooling layer does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import dropout
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.bypass import first_argument, input_of, is_continuous
from resist_lightning.state.random_state import random_state, set_random_state

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu, functional.silu,
    functional.hardswish, functional.mish, torch.tanh,
)  # fmt: skip
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class FirstForward:
    """Checks the first forward of each block on every worker, by hooks that remove themselves.

    Absent blocks are checked too, with weights of zero, so that all workers raise the same error in the first step.

    Args:
        blocks: all blocks, with their own forwards.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._looks = [_Look(block) for block in blocks]

    def remove(self) -> None:
        """Remove the hooks."""
        for look in self._looks:
            look.remove()


class _Look:
    """The check of one block."""

    def __init__(self, block: Block) -> None:
        module = block.module
        self._block = block
        self._argument = first_argument(module)
        self._body = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        self._forward: Callable[..., Any] = self._body.forward
        self._compiled = module._compiled_call_impl
        if self._compiled is not None:
            module._compiled_call_impl = None  # compiled code has only the hooks that it was compiled with
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Remove the hooks, and restore compiled code."""
        if self._handles and self._compiled is not None:
            self._block.module._compiled_call_impl = self._compiled
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # the network is compiled as a whole, and tensors have no values
            return
        x = input_of(self._block.name, self._argument, args, kwargs)
        if not any(isinstance(child, torch.jit.ScriptModule) for child in self._body.modules()):
            self._try(x, args, kwargs)

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._compare(input_of(self._block.name, self._argument, args, kwargs), output)
        self.remove()

    def _try(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the block on random numbers with weights of zero; a forward that raises then is not judged."""
        present = not any(tensor.is_meta for tensor in self._block.tensors().values())
        generator = torch.Generator(x.device).manual_seed(0)
        inputs = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for _ in range(2)]
        random = random_state()  # dropout in the block must draw in training what it would have drawn
        try:
            with torch.inference_mode(False), torch.no_grad(), without_weights(self._body, x.device):
                given = [value.clone() for value in inputs]
                outputs = [self._call(value, args, kwargs) for value in given]
                norms = _norms_among_others(self._body)
                residual = isinstance(outputs[0], Tensor) and _is_residual(inputs, outputs, norms)
        except Exception:  # noqa: BLE001 - the user's code, given what it may not expect
            return
        finally:
            set_random_state(random)
        # Outside of the `try`: these errors are for the user.
        self._compare(x, outputs[0])
        if self._block.branch_end is None and given[0]._version > 0:
            raise BlockSelectionError(
                f"block {self._block.name!r} ({type(self._block.module).__name__}) writes into its input (x += ..., "
                "inplace=True), and its residual branch is scaled by means of that input, as x + s (block(x) - x). "
                "Write x = x + ... instead, leave the block out of `blocks`, or declare `residual_branch_end` in its "
                "class (docs/adding-a-model.md)."
            )
        if present and self._block.branch_end is None and not residual:
            raise BlockSelectionError(
                f"block {self._block.name!r} ({type(self._block.module).__name__}) is not residual: with its weights "
                "at zero it does not give back its input (nor an activation or a norm of it), so leaving it out is not "
                "the identity. Leave it out of `blocks`; if it adds a residual all the same, declare "
                "`residual_branch_end` in its class (docs/adding-a-model.md)."
            )

    def _call(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block's own forward on ``x``, with copies of its other arguments."""
        if args:
            return self._forward(x, *_copy(args[1:]), **_copy(kwargs))
        return self._forward(**{**_copy(kwargs), self._argument: x})

    def _compare(self, x: Tensor, output: Any) -> None:
        name = self._block.name
        if not isinstance(output, Tensor):
            raise BlockSelectionError(
                f"block {name!r} returns a {type(output).__name__}, and a block that is left out gives back its input, "
                "a tensor. Return the tensor alone, or leave the block out of `blocks`."
            )
        if output.shape != x.shape:
            raise BlockSelectionError(
                f"block {name!r} changes the shape of its input from {tuple(x.shape)} to {tuple(output.shape)}, so "
                "leaving it out is not the identity. Leave it out of `blocks`."
            )
        casts = torch.is_autocast_enabled(x.device.type) and output.is_floating_point()
        if output.dtype != x.dtype and not casts:
            raise BlockSelectionError(
                f"block {name!r} changes the data type of its input from {x.dtype} to {output.dtype}, so leaving it "
                "out is not the identity. Return the data type of the input, or leave the block out of `blocks`."
            )


@contextmanager
def without_weights(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a module has weights of zero and norms without statistics; afterwards it is as before, bit for bit.

    The user's hooks are not called, and what the forward leaves in attributes and buffers is undone.

    Args:
        module: present or absent.
        device: where its tensors are when it is present.
    """
    children = list(module.modules())
    kept = [dict(vars(child)) for child in children]
    for child in children:
        _clear(child, device, inner=child is not module)
    try:
        yield
    finally:
        for child, attributes in zip(children, kept, strict=True):
            vars(child).clear()
            vars(child).update(attributes)


def _clear(child: nn.Module, device: torch.device, *, inner: bool) -> None:
    """Give one module zero weights, fresh buffers, and no hooks."""
    norm = _is_norm(child)
    parameters, buffers = {}, {}
    for name, parameter in child._parameters.items():
        # A norm keeps its scale: a block that ends in a norm of its input would return zero.
        parameters[name] = _parameter(parameter, float(norm and _is_scale(name)), device)
    for name, buffer in child._buffers.items():
        buffers[name] = _buffer(name, buffer, device, plain=norm)
    # torch's own pre-hooks stay, as they compute weights (weight_norm, pruning); of zeros these may be NaN.
    pre_hooks = {i: h for i, h in child._forward_pre_hooks.items() if type(h).__module__.startswith("torch.nn.")}
    vars(child).update(
        _parameters=parameters,
        _buffers=buffers,
        _compiled_call_impl=None,
        _forward_hooks=OrderedDict([(0, _no_nan)] if inner else []),
        _forward_hooks_with_kwargs=OrderedDict(),
        _forward_pre_hooks=OrderedDict(pre_hooks),
        _backward_hooks=OrderedDict(),
        _backward_pre_hooks=OrderedDict(),
    )
    if isinstance(child, dropout._DropoutNd):
        vars(child).update(training=False)
    if isinstance(child, nn.RNNBase):  # which reads its weights from a list of its own
        vars(child).update(_flat_weights=[parameters.get(name) for name in child._flat_weights_names])


def _parameter(parameter: Tensor | None, value: float, device: torch.device) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(torch.full(parameter.shape, value, dtype=parameter.dtype, device=device), requires_grad=False)


def _buffer(name: str, buffer: Tensor | None, device: torch.device, *, plain: bool) -> Tensor | None:
    """A copy of a buffer; for a norm, and where it is absent, neutral numbers."""
    if buffer is None:
        return None
    if not buffer.is_meta and not plain:
        return buffer.clone()
    return torch.full(buffer.shape, float("var" in name or _is_scale(name)), device=device).to(buffer.dtype)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _norms_among_others(module: nn.Module) -> list[nn.Module]:
    """The norms of a module, unless norms are all that it has."""
    norms = [child for child in module.modules() if _is_norm(child)]
    in_norms = sum(1 for norm in norms for _ in norm.parameters())
    return norms if in_norms < sum(1 for _ in module.parameters()) else []


def _is_scale(name: str) -> bool:
    return name in ("weight", "gamma", "scale", "g")


def _no_nan(_: nn.Module, __: Any, output: Any) -> Any:
    """A forward hook that replaces NaN by zero: normalised zeros are NaN."""
    return tree_map(lambda value: value.nan_to_num(0.0, 0.0, 0.0) if is_continuous(value) else value, output)


def _is_residual(inputs: Sequence[Tensor], outputs: Sequence[Tensor], norms: Sequence[nn.Module]) -> bool:
    """Whether the outputs are the inputs plus a constant, or an activation or a norm of the inputs."""
    x, y = _numbers(inputs[0]), _numbers(outputs[0])
    if x.shape != y.shape or not y.isfinite().all():
        return True  # shapes are compared elsewhere, and without numbers nothing is known
    coarse = inputs[0].dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type)
    tolerance = 0.05 if coarse else 1e-3

    def same(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs().max() <= tolerance).item()) if a.numel() else True

    if same(_numbers(outputs[1]) - y, _numbers(inputs[1]) - x) or any(same(y, act(x)) for act in _ACTIVATIONS):
        return True
    for norm in norms:
        try:
            normed = _numbers(norm(inputs[0]))
        except Exception:  # noqa: BLE001 - of another width
            continue
        if any(same(y, act(normed)) for act in (lambda value: value, *_ACTIVATIONS)):
            return True
    return False


def _numbers(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.float()


def _copy(arguments: Any) -> Any:
    """Copies of arguments, as a forward may write to them.

    Raises:
        TypeError: for objects of the user's classes, which may change when they are used.
    """
    leaves, structure = tree_flatten(arguments)
    return tree_unflatten([_copy_leaf(leaf) for leaf in leaves], structure)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if isinstance(leaf, _PLAIN):
        return leaf
    raise TypeError(f"a {type(leaf).__name__} cannot be copied")
