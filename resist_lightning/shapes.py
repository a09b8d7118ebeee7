"""What can be said of a module that may be a residual block without running it."""

from __future__ import annotations

import torch
from torch import nn


def why_not(module: nn.Module) -> str | None:
    """Why leaving a module out is surely not the identity; None if it may be."""
    if projection(module) is not None:
        return f"changes the shape of its input (its skip path has the layer {projection(module)!r})"
    if _is_chain(module):
        return f"is a single layer or a chain of layers ({type(module).__name__}), and adds no residual"
    if not any(True for _ in module.parameters()):
        return "has no parameters, so there is nothing to partition"
    return None


def _is_chain(module: nn.Module) -> bool:
    """Whether it is a layer of torch.nn, or a sequence with such a layer, so that no sum reaches around it."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return any(_is_chain(child) for child in module)
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):  # not the class's own
        return False
    known = str(type(module).forward.__module__).startswith("torch.nn.modules.")
    residual = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | nn.Identity)
    return known and not residual and not isinstance(module, nn.Transformer)


def keeps_shape(module: nn.Module) -> bool:
    """Whether a block seems to keep the shape of its input.

    It has no projection on the skip path, no stride, and as many channels out of its last layer as into its first one,
    in the order of registration: of blocks that mix tokens or take a condition that says nothing.
    """
    if projection(module) is not None or has_stride(module):
        return False
    layers = [child for child in module.modules() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    return not layers or _width(layers[0], "in") == _width(layers[-1], "out")


def projection(module: nn.Module) -> str | None:
    """Name of the layer on the skip path of a block, if there is one with parameters."""
    for name in ("downsample", "shortcut"):
        path = getattr(module, name, None)
        if isinstance(path, nn.Module) and any(True for _ in path.parameters()):
            return name
    return None


def has_stride(module: nn.Module) -> bool:
    """Whether a convolution in it has a stride."""
    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return any(max(layer.stride) > 1 for layer in convolutions)


def _width(layer: nn.Module, side: str) -> object:
    return getattr(layer, f"{side}_channels", None) or getattr(layer, f"{side}_features", None)
