"""Recognises the residual blocks of a network."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist_lightning.methods.globs import summary

_KNOWN_FAMILIES = re.compile(r"^(torchvision|timm)\.models\.resnet$")
_KNOWN_BLOCKS = ("BasicBlock", "Bottleneck")


@dataclass(frozen=True)
class Block:
    """A residual block.

    Args:
        name: its qualified name in the user's module.
        module: the block itself; its output is its input plus (or an activation of its input plus) a residual branch.
        branch_end: name of the submodule whose output is the residual branch, so that scaling its weight and bias
            scales the branch; None if unknown.
        keeps_shape: whether input and output seem to have the same shape, judged without running it; the first
            forward will tell (:mod:`resist_lightning.methods.resist.first_forward`).
    """

    name: str
    module: nn.Module
    branch_end: str | None
    keeps_shape: bool

    @property
    def section(self) -> str:
        """Name of the container, which holds the blocks of one resolution."""
        return self.name.rpartition(".")[0]

    @property
    def network(self) -> str:
        """Name of what contains the sections of one network."""
        return self.section.rpartition(".")[0]

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters, then its buffers, by qualified name."""
        own: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {f"{self.name}.{name}": tensor for name, tensor in own.items()}


def find_blocks(module: nn.Module) -> tuple[Block, ...]:
    """All residual blocks that are recognised: torchvision's, timm's, and modules with ``residual_branch_end``."""
    found = (recognise(name, child) for name, child in module.named_modules())
    return tuple(block for block in found if block is not None)


def recognise(name: str, module: nn.Module) -> Block | None:
    """The residual block that ``module`` is, or None.

    A class of one's own takes part by declaring ``residual_branch_end`` (see docs/adding-a-model.md).
    """
    declared = getattr(module, "residual_branch_end", None)
    if isinstance(declared, str):
        return Block(name, module, declared, projection(module) is None and not has_stride(module))
    for base in type(module).__mro__:
        if base.__name__ in _KNOWN_BLOCKS and _KNOWN_FAMILIES.match(base.__module__):
            unchanged = type(module).forward is base.__dict__.get("forward") and getattr(module, "se", None) is None
            branch_end = "bn3" if hasattr(module, "bn3") else "bn2"
            return Block(name, module, branch_end if unchanged else None, keeps_shape(module))
    return None


def block_at(name: str, module: nn.Module) -> Block:
    """``module`` as a block of this name, whether its class is recognised or not."""
    return recognise(name, module) or Block(name, module, None, keeps_shape(module))


def scripted(module: nn.Module) -> list[str]:
    """Names of the submodules that are TorchScript."""
    return [name for name, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule)]


def candidates(module: nn.Module) -> str:
    """A sentence that lists the blocks that could be chosen."""
    names = [block.name for block in find_blocks(module) if block.keeps_shape]
    if not names:
        return (
            "No residual block was recognised in this model: name modules of your own by a glob, or declare "
            "`residual_branch_end` in the block's class."
        )
    return f"Blocks that can be partitioned: {summary(names)}."


def untrained(module: nn.Module, blocks: Iterable[Block], trained: Collection[int] | None = None) -> list[Block]:
    """Those of some blocks in whose network nothing trains now; see :func:`select_blocks`."""
    blocks = list(blocks)
    networks = {block.network for block in blocks}
    still = {name for name in networks if not _trains(module.get_submodule(name), trained)}
    return [block for block in blocks if block.network in still]


def _trains(network: nn.Module, trained: Collection[int] | None) -> bool:
    return any(p.requires_grad and (trained is None or id(p) in trained) for p in network.parameters())


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
