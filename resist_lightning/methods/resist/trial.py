"""Runs a module with other weights than its own, without a trace: tensors, hooks and attributes are as before."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import dropout
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from resist_lightning.methods.resist.bypass import is_continuous

Weights: TypeAlias = Callable[[nn.Module, str, torch.Size], Tensor]
"""From a submodule, the name of its tensor and the shape: the tensor's value in the trial, floating, on the CPU."""

Statistics: TypeAlias = tuple[float, float]
"""Running mean and variance of the norms in a trial."""

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, type(None))


@contextmanager
def trial(
    module: nn.Module,
    device: torch.device,
    weights: Weights,
    *,
    dtype: torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> Iterator[None]:
    """Inside, a module has other weights and no dropout; afterwards it is as before.

    The user's hooks are not called. Writes of the forward to attributes and buffers are undone, also in lists, dicts,
    sets and tensors that are attributes.

    Args:
        module: the module, present or absent.
        device: device of its tensors when it is present.
        weights: values of its parameters.
        dtype: data type of its floating tensors; None for their own.
        statistics: running statistics of its norms, in evaluation mode; None: (0, 1), without a change of mode.
    """
    children = list(module.modules())
    kept = [dict(vars(child)) for child in children]
    contents = [_Content(value) for child in children for value in _attributes(child)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # torch's fused encoder layer would read other weights than the trial's.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False) if dtype is not None else nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            for child in children:
                _replace(child, device, weights, dtype, statistics, inner=child is not module)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, attributes in zip(children, kept, strict=True):
            vars(child).clear()
            vars(child).update(attributes)
        for content in contents:
            content.restore()


class _Content:
    """The content of an attribute, to be restored in the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._kept = value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)

    def restore(self) -> None:
        """Undo writes into the object."""
        value = self._value
        if isinstance(value, Tensor):
            if not torch.equal(value, self._kept):
                value.data.copy_(self._kept)
        elif isinstance(value, list):
            value[:] = self._kept
        else:
            value.clear()
            if isinstance(value, deque):
                value.extend(self._kept)
            else:
                value.update(self._kept)


def _attributes(child: nn.Module) -> list[Any]:
    """The attributes of a module that a forward may write into; torch's own are replaced as a whole."""
    own = vars(nn.Module())
    found = []
    for name, value in vars(child).items():
        written = isinstance(value, list | dict | set | deque) or (isinstance(value, Tensor) and not value.is_meta)
        if name not in own and written:
            found.append(value)
    return found


def zero_weights(child: nn.Module, name: str, shape: torch.Size) -> Tensor:
    """Zeros. A norm keeps its scale: a block that ends in a norm of its input would return zero."""
    return torch.full(shape, float(is_norm(child) and is_scale(name)))


def random_weights() -> Weights:
    """Weights of usual size, the same on all workers; those of linear layers keep the size of the input."""
    generator = torch.Generator().manual_seed(0)

    def draw(child: nn.Module, name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator, device="cpu")
        if is_norm(child) and is_scale(name):
            return 1 + 0.2 * noise
        if len(shape) < 2:
            return 0.5 * noise
        convolution = isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        inputs = noise.numel() / shape[0] if convolution or len(shape) == 2 else shape[-1]
        size: float = inputs**0.5
        return noise / size

    return draw


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by its name."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def is_scale(name: str) -> bool:
    """Whether a tensor of a norm multiplies, by its name."""
    return name in ("weight", "gamma", "scale", "g")


def copied(arguments: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of arguments, as a forward may write into them.

    Args:
        arguments: tensors and plain values in tuples, lists, dicts and objects, such as a cache of keys and values.
        dtype: data type of the floating tensors in the copies; None for their own.

    Raises:
        TypeError: for objects that cannot be copied attribute by attribute.
    """
    leaves, structure = tree_flatten(arguments)
    return tree_unflatten([_copied_leaf(leaf, dtype) for leaf in leaves], structure)


def two_samples(
    x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None:
    """The arguments for the first two samples of a batch; None where these may not be enough."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if x.dim() < 3 or len(x) <= 2:
        return None
    if not all(isinstance(leaf, Tensor | bool | int | float | str | type(None)) for leaf in leaves):
        return None
    for tensor in tensors:
        # Other integers may be indices, such as the edges of a graph, that point to other samples.
        counted = tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.dim() == 0
        if not counted and len(tensor) not in (1, len(x)):
            return None
    first = x[:2]
    cut = []
    for leaf in leaves:
        per_sample = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == len(x)
        # One object, as before: an input that is passed twice is recognised by it.
        cut.append(first if leaf is x else leaf[:2] if per_sample else leaf)
    given, named = tree_unflatten(cut, structure)
    return first, given, named


def _copied_leaf(leaf: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(leaf, Tensor):
        found = leaf.detach().clone()
        return found if dtype is None or not found.is_floating_point() else found.to(dtype)
    if isinstance(leaf, _PLAIN) or callable(leaf):
        return leaf
    if not hasattr(leaf, "__dict__") or isinstance(leaf, nn.Module):
        raise TypeError(f"a {type(leaf).__name__} cannot be copied")
    twin = copy.copy(leaf)
    vars(twin).update({name: copied(value, dtype) for name, value in vars(leaf).items()})
    return twin


def _replace(
    child: nn.Module,
    device: torch.device,
    weights: Weights,
    dtype: torch.dtype | None,
    statistics: Statistics | None,
    *,
    inner: bool,
) -> None:
    """Give one module the trial's weights, fresh buffers, and no hooks."""
    parameters: dict[str, nn.Parameter | None] = {}
    buffers: dict[str, Tensor | None] = {}
    for name, parameter in child._parameters.items():
        if parameter is None:
            parameters[name] = None
            continue
        value = weights(child, name, parameter.shape).to(device, dtype or parameter.dtype)
        parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, buffer in child._buffers.items():
        buffers[name] = None if buffer is None else _buffer(child, name, buffer, device, dtype, statistics)
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
    # In evaluation stochastic depth and layer-drop are off too: modules that they leave out would not be seen.
    if statistics is not None or isinstance(child, dropout._DropoutNd):
        vars(child).update(training=False)
    if isinstance(child, nn.RNNBase):  # which reads its weights from a list of its own
        vars(child).update(_flat_weights=[parameters.get(name) for name in child._flat_weights_names])


def _buffer(
    child: nn.Module,
    name: str,
    buffer: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    statistics: Statistics | None,
) -> Tensor:
    """A copy of a buffer; the trial's statistics for a norm; where it is absent, neutral numbers."""
    mean, variance = statistics or (0.0, 1.0)
    if is_norm(child) and name in ("running_mean", "running_var"):
        found = torch.full(buffer.shape, mean if name == "running_mean" else variance, device=device).to(buffer.dtype)
    elif buffer.is_meta or is_norm(child):
        found = torch.full(buffer.shape, float("var" in name or is_scale(name)), device=device).to(buffer.dtype)
    else:
        found = buffer.clone()
    return found if dtype is None or not found.is_floating_point() else found.to(dtype)


def _no_nan(_: nn.Module, __: Any, output: Any) -> Any:
    """A forward hook that replaces NaN by zero: normalised zeros are NaN."""
    return tree_map(_finite, output)


def _finite(value: Any) -> Any:
    # The same object where possible, so that an argument which is passed on is recognised.
    if not is_continuous(value) or bool(value.isfinite().all()):
        return value
    return value.nan_to_num(0.0, 0.0, 0.0)


def own_tensors(child: nn.Module) -> Mapping[str, Tensor]:
    """The floating parameters of a module without its submodules', and weight and bias of a frozen norm."""
    found: dict[str, Tensor] = {}
    for name, parameter in child._parameters.items():
        if parameter is not None and parameter.is_floating_point():
            found[name] = parameter
    for name in ("weight", "bias"):
        buffer = child._buffers.get(name)
        if buffer is not None and buffer.is_floating_point():
            found[name] = buffer
    if "gain" in found:  # timm's standardised convolutions divide by the size of their weight
        found.pop("weight", None)
    return found
