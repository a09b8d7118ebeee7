"""Normalises the vectors of spectral norm after an average, which has shortened them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


def unit_vectors(module: nn.Module) -> dict[str, Tensor]:
    """The unit vectors among the buffers of ``module``, by name: those of torch's spectral norm, old and new."""
    buffers = dict(module.named_buffers())
    return {name: buffers[name] for name in _names(module) if name in buffers}


def normalise(vectors: Iterable[Tensor]) -> None:
    """Give vectors the length 1, in place; zeros stay."""
    with torch.no_grad():
        for vector in vectors:
            length = vector.norm()
            vector.div_(length.clamp_min(torch.finfo(vector.dtype).tiny))


def _names(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        # The new spectral norm is a module of its own, the old one a hook.
        if isinstance(child, _SpectralNorm):
            yield from (f"{prefix}_u", f"{prefix}_v")
        for hook in child._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield from (f"{prefix}{hook.name}_u", f"{prefix}{hook.name}_v")
