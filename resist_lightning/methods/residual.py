"""Recognises the residual blocks of a network: torchvision's, timm's, and classes that declare themselves."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.globs import summary
from resist_lightning.methods.tracing import trains
from resist_lightning.state.compiled import CompiledCall

_KNOWN_FAMILIES = re.compile(r"^(torchvision|timm)\.models\.resnet$")
_KNOWN_BLOCKS = ("BasicBlock", "Bottleneck")


@dataclass(frozen=True)
class BranchEnd:
    """The end of a residual branch of a block, verified by running the block.

    Args:
        tensors: names, within the block, of tensors of one submodule that the branch is proportional to.
        module: name, within the block, of the submodule whose output is proportional to them; None if none is called.
        divided: names, within the block, of tensors that are divided by a factor on the others: of a gate whose input
            is proportional to them, as in squeeze-and-excitation.
    """

    tensors: tuple[str, ...]
    module: str | None
    divided: tuple[str, ...] = ()


@dataclass
class Seen:
    """Findings of the first forward of a block.

    Attributes:
        ends: ends of its residual branches; None before the first forward, empty if they could not be verified.
        assumed: whether the ends are those of a checkpoint, and the first forward of this run is still to come.
        output: form by which its output is made of its arguments while it is absent; None if the output is the input.
        why: error of the last failed search for its ends; empty if there was none.
        called: whether the block has been called by now; None where nothing waits for this.
    """

    ends: tuple[BranchEnd, ...] | None = None
    assumed: bool = False
    output: Any = None
    why: str = ""
    called: bool | None = None

    def take(self, other: Seen) -> None:
        """Take over the findings of a copy of the block."""
        self.ends, self.output = other.ends, other.output


@dataclass(frozen=True)
class Block:
    """A residual block.

    Args:
        name: its qualified name in the user's module.
        module: the block itself; its output is its input plus (or an activation of its input plus) a residual branch.
        branch_end: name of the submodule whose output is the residual branch, so that scaling its weight and bias
            scales the branch; None if unknown.
        keeps_shape: whether input and output seem to have the same shape; a guess until its first forward.
        seen: findings of its first forward.
        not_own: names, within the block, of tensors that other modules have too, and that all workers hold.
    """

    name: str
    module: nn.Module
    branch_end: str | None
    keeps_shape: bool
    seen: Seen = field(default_factory=Seen, compare=False)
    not_own: frozenset[str] = frozenset()

    @property
    def section(self) -> str:
        """Name of the container, which holds the blocks of one resolution."""
        return self.name.rpartition(".")[0]

    @property
    def network(self) -> str:
        """Name of the network, which contains the sections."""
        return self.section.rpartition(".")[0]

    @cached_property
    def compiled(self) -> CompiledCall:
        """The block's compiled code, which must not run while the block's hooks or forward are replaced."""
        return CompiledCall(self.module)

    @cached_property
    def _at_start(self) -> dict[str, Tensor]:
        """The block's own tensors by name when they were first asked for, before the network ran."""
        return {name: tensor for name, tensor in named_tensors(self.module).items() if name not in self.not_own}

    def tensors(self) -> dict[str, Tensor]:
        """The block's own parameters, then its buffers, by qualified name; none that a forward has registered since."""
        names = {id(tensor): name for name, tensor in named_tensors(self.module).items()}
        return {f"{self.name}.{names.get(id(tensor), name)}": tensor for name, tensor in self._at_start.items()}


def find_blocks(module: nn.Module) -> tuple[Block, ...]:
    """All residual blocks that are recognised, in the order of registration."""
    found = []
    for name, child in module.named_modules():
        block = recognise(name, child)
        if block is not None:
            found.append(block)
    return tuple(found)


def recognise(name: str, module: nn.Module) -> Block | None:
    """``module`` as a block, if its class is known or declares ``residual_branch_end`` (docs/adding-a-model.md)."""
    declared = getattr(module, "residual_branch_end", None)
    if isinstance(declared, str):
        return Block(name, module, declared, projection(module) is None and not has_stride(module))
    for base in type(module).__mro__:
        if base.__name__ not in _KNOWN_BLOCKS or not _KNOWN_FAMILIES.match(base.__module__):
            continue
        # A forward of a derived class, or of this object alone, or squeeze-and-excitation may end the branch elsewhere.
        own = type(module).forward is not base.__dict__.get("forward") or "forward" in vars(module)
        unchanged = not own and getattr(module, "se", None) is None
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
    """A sentence for errors that lists the blocks to choose from."""
    names = [block.name for block in find_blocks(module) if block.keeps_shape]
    if not names:
        return (
            "No residual block was recognised in this model: a block's own forward must add its input, as x + "
            "branch(x). Name modules of your own by a glob, or declare `residual_branch_end` in the block's class."
        )
    return f"Blocks that can be partitioned: {summary(names)}."


def untrained(module: nn.Module, blocks: Iterable[Block], trained: Collection[int] | None = None) -> list[Block]:
    """The blocks whose network does not train.

    Args:
        module: the user's module.
        blocks: the blocks to look at.
        trained: ids of the parameters that optimizers have; None if they are not known yet.
    """
    blocks = list(blocks)
    networks = {block.network for block in blocks}
    still = {name for name in networks if not trains(module.get_submodule(name).parameters(), trained)}
    return [block for block in blocks if block.network in still]


def why_not(module: nn.Module) -> str | None:
    """The reason why leaving out a module is certainly not the identity; None if it may be."""
    if projection(module) is not None:
        return f"changes the shape of its input (its skip path has the layer {projection(module)!r})"
    if _is_chain(module):
        return f"is a single layer or a chain of layers ({type(module).__name__}), and adds no residual"
    if not any(True for _ in module.parameters()):
        return "has no parameters, so there is nothing to partition"
    return None


def _is_chain(module: nn.Module) -> bool:
    """Whether a module is a layer of torch.nn, or a sequence with such a layer, so that it has no skip connection."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return any(_is_chain(child) for child in module)
    # A forward that the user has put in place of the class's may add a residual.
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    known = str(type(module).forward.__module__).startswith("torch.nn.modules.")
    residual = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | nn.Identity)
    return known and not residual and not isinstance(module, nn.Transformer)


def keeps_shape(module: nn.Module) -> bool:
    """Whether a block seems to keep the shape of its input, judged without running it.

    It must have no projection on the skip path, no stride, and equal channels into its first layer and out of its last
    one, in the order of registration; for blocks that mix tokens or take a condition, that proves nothing.
    """
    if projection(module) is not None or has_stride(module):
        return False
    layers = [child for child in module.modules() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    return not layers or _width(layers[0], "in") == _width(layers[-1], "out")


def projection(module: nn.Module) -> str | None:
    """Name of the layer with parameters on the skip path of a block, if there is one."""
    for name in ("downsample", "shortcut"):
        path = getattr(module, name, None)
        if isinstance(path, nn.Module) and any(True for _ in path.parameters()):
            return name
    return None


def has_stride(module: nn.Module) -> bool:
    """Whether a module contains a convolution with a stride."""
    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return any(max(layer.stride) > 1 for layer in convolutions)


def _width(layer: nn.Module, side: str) -> object:
    return getattr(layer, f"{side}_channels", None) or getattr(layer, f"{side}_features", None)


def parameters_of(blocks: Sequence[Block]) -> list[nn.Parameter]:
    """The parameters of some blocks, without those that other modules have too."""
    return [tensor for block in blocks for tensor in block.tensors().values() if isinstance(tensor, nn.Parameter)]
