"""Decides numerically whether a module with weights of zero is the identity, so that a worker may leave it out.

The first forward of each block asks this with the network's own inputs. The default choice asks it earlier, with random
inputs of the shapes that a block is likely to take, so that no candidate is chosen that the first forward would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from resist_lightning.methods.residual import Block, recognise, scripted
from resist_lightning.methods.resist.bypass import signature
from resist_lightning.methods.resist.trial import is_norm, trial, zero_weights
from resist_lightning.state.compiled import uncompiled
from resist_lightning.state.random_state import random_numbers_apart

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu, functional.silu,
    functional.hardswish, functional.mish, torch.tanh,
)  # fmt: skip

_WIDTHS = ("in_channels", "in_features", "num_features", "num_channels", "normalized_shape")
"""Attributes of torch's layers that tell the width of their input."""

_SIZES = ((2, 5, 0), (2, 0, 5, 5), (2, 5, 5, 0), (8, 0), (2, 0, 5), (2, 0, 3, 3, 3))
"""Shapes of inputs, small ones, as a trial costs time; the width stands in the place of 0."""


def residual_only(blocks: Sequence[Block]) -> list[Block]:
    """The blocks without those that a trial shows not to be residual.

    Blocks of known classes are not tried, and those that run on none of the inputs are kept: their first forward
    decides.
    """
    tried: dict[Any, bool] = {}
    found = []
    for block in blocks:
        if recognise(block.name, block.module) is None:
            shapes = tuple(tensor.shape for tensor in [*block.module.parameters(), *block.module.buffers()])
            key = kind_of(block.module), shapes
            if key not in tried:
                tried[key] = _is_no_identity(block.module)
            if tried[key]:
                continue
        found.append(block)
    return found


def kind_of(module: nn.Module) -> Any:
    """A key that is the same for modules of one structure, with the same flags, whatever their width is."""
    parts = []
    for name, child in module.named_modules():
        flags = [(key, value) for key, value in vars(child).items() if isinstance(value, bool | str)]
        parts.append((name, type(child), tuple(flags)))
    return tuple(parts), tuple(name for name, _ in module.named_parameters())


def is_residual(inputs: Sequence[Tensor], outputs: Sequence[Tensor], norms: Sequence[nn.Module]) -> bool:
    """Whether the outputs are the inputs plus a constant, or an activation or a norm of the inputs.

    Args:
        inputs: two inputs.
        outputs: the outputs for them, of a module with weights of zero.
        norms: see :func:`norms_among_others`.
    """
    x, y = _numbers(inputs[0]), _numbers(outputs[0])
    if x.shape != y.shape or not y.isfinite().all():
        return True  # shapes are compared elsewhere, and without entries nothing is known
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


def norms_among_others(module: nn.Module) -> list[nn.Module]:
    """The norms of a module, unless norms are all that it has."""
    norms = [child for child in module.modules() if is_norm(child)]
    in_norms = sum(1 for norm in norms for _ in norm.parameters())
    return norms if in_norms < sum(1 for _ in module.parameters()) else []


def _is_no_identity(module: nn.Module) -> bool:
    """Whether a module runs on some likely input, and returns none of those on which it runs."""
    body: nn.Module = getattr(module, "_orig_mod", module)
    if scripted(body):
        return False
    required = [
        argument
        for argument in signature(module).parameters.values()
        if argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    ran = False
    for shape in _likely_shapes(body):
        # Others may be a mask that keeps where it is one, or where it is zero: each leaves the input as it is once.
        for fill in (0.0, 1.0) if len(required) > 1 else (0.0,):
            returned = _returns_its_input(body, shape, [fill] * (len(required) - 1))
            if returned:
                return False
            ran |= returned is False
    return ran


def _returns_its_input(body: nn.Module, shape: Sequence[int], fills: Sequence[float]) -> bool | None:
    """Whether a module with weights of zero returns its input; None if that is not known, as it does not run."""
    parameter = next(iter(body.parameters()), None)
    device = torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tuple(shape), generator=generator, device="cpu").to(device) for _ in range(2)]
    try:
        with random_numbers_apart(), uncompiled(body), trial(body, device, _zeros_without_memory, dtype=torch.float32):
            outputs = []
            for x in inputs:
                others = [torch.full_like(x, fill) for fill in fills]
                outputs.append(tree_leaves(body.forward(x.clone(), *others))[0])
            if any(output.shape != x.shape for x, output in zip(inputs, outputs, strict=True)):
                return None if fills else False  # other arguments of another shape may be the reason
            return is_residual(inputs, outputs, norms_among_others(body))
    except Exception:  # noqa: BLE001 - the user's code, given unexpected arguments
        return None


def _likely_shapes(module: nn.Module) -> Iterator[Sequence[int]]:
    """Shapes of inputs that the first layer of a module may take."""
    for child in module.modules():
        widths = [getattr(child, name) for name in _WIDTHS if hasattr(child, name)]
        if widths:
            width = widths[0][-1] if isinstance(widths[0], Sequence) else widths[0]
            for sizes in _SIZES:
                yield [size or width for size in sizes]
            return


def _zeros_without_memory(child: nn.Module, name: str, shape: torch.Size) -> Tensor:
    """The values of :func:`zero_weights`, which all lie in one place: a block may be large, and memory small."""
    return zero_weights(child, name, torch.Size([])).expand(shape)


def _numbers(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.float()
