"""Runs a block with factors on some of its tensors, to find where its branches end; see :mod:`.branches`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resist_lightning.methods.resist.bypass import is_continuous
from resist_lightning.methods.resist.trial import is_norm, own_tensors
from resist_lightning.state.random_state import random_state, set_random_state

EXACT = 1e-5
"""Largest deviation from the identity, relative to the input; and the least change that counts as one."""

Call: TypeAlias = Callable[[Tensor], Any]
Group: TypeAlias = tuple[str, ...]
"""Names, within the block, of tensors of one submodule."""


class NotSeenError(Exception):
    """A part of a block did not run, so that its contribution is unknown."""


@dataclass(frozen=True)
class Output:
    """Results of a run.

    Args:
        value: the block's output.
        called: names of the submodules that were called, in the order in which they returned.
        inside: outputs of some submodules, by name.
    """

    value: Tensor
    called: Sequence[str]
    inside: Mapping[str, Tensor]


class Runs:
    """Runs a block, inside a trial, with factors on some of its tensors.

    Args:
        body: the block.
        x: an input of it, for shape, device and data type.
        call: calls its forward with an input.

    Attributes:
        x: a random input of this shape.
        groups: the groups of tensors that may end a branch.
        names: names of all submodules.
    """

    def __init__(self, body: nn.Module, x: Tensor, call: Call) -> None:
        self._body = body
        self._call = call
        self._tensors: dict[str, Tensor] = {}
        self.groups: list[Group] = []
        self.names: list[str] = [name for name, _ in body.named_modules()]
        for owner, child in body.named_modules():
            own = {f"{owner}.{name}".lstrip("."): tensor for name, tensor in own_tensors(child).items()}
            self._tensors.update(own)
            self.groups.extend(_groups_of(owner, tuple(own)))
        # Only of the tensors that are scaled now: a copy of all weights would be a second one in single precision.
        self._originals: dict[str, Tensor] = {}
        # Every run begins with the same random state, for forwards that draw numbers even in evaluation mode.
        self._random = random_state()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype)
        self._bypassed: set[str] = set()
        self._bypass_norms_of_the_skip()

    def check_all_seen(self) -> None:
        """Raise a NotSeenError if a submodule with tensors is not called, and its tensors have no effect either."""
        full = self.run({}, ())
        for group in self.groups:
            owner = group[0].rpartition(".")[0]
            if not owner or owner in full.called:
                continue
            # Some layers are not called, but read by the module around them.
            without = self.run(dict.fromkeys(group, 0.0), ()).value
            if differ_at_most(without, full.value, EXACT * full.value.abs().max()):
                raise NotSeenError(f"{group[0]} was not used")

    def has(self, names: Iterable[str]) -> bool:
        """Whether the block has tensors of these names."""
        return all(name in self._tensors for name in names)

    def gate_after(self, group: Group, order: Sequence[str]) -> str:
        """Name of the first weight matrix that is used after a group's layer has returned; empty if there is none.

        Args:
            group: the group.
            order: the submodules in the order in which they return.
        """
        for owner in order[position(group, order) + 1 :]:
            name = f"{owner}.weight"
            if name in self._tensors and self._tensors[name].dim() > 1:
                return name
        return ""

    def is_identity(self, x: Tensor, off: Collection[Group]) -> bool:
        """Whether the block without its branches returns its input, or an activation of it that only clips."""
        value = self.run({}, off, x).value
        if value.shape != x.shape:
            return False
        inside = between_bounds(value)
        enough = bool(inside.float().mean() > 0.1)
        return enough and differ_at_most(value[inside], x[inside], EXACT * x.abs().max())

    def _bypass_norms_of_the_skip(self) -> None:
        """Let norms that lie on the skip path itself, behind a sum, return their input."""
        if self.is_identity(self.x, self.groups):
            return
        other = self.x.flip(0) + 1
        for name, child in self._body.named_modules():
            if not name or not is_norm(child) or not own_tensors(child):
                continue
            off = [tuple(f"{name}.{tensor}" for tensor in own_tensors(child))]
            # Nothing of the input is left behind a norm that is switched off, so there is no way around it.
            here, there = self.run({}, off).value, self.run({}, off, other).value
            if differ_at_most(here, there, EXACT * self.x.abs().max()):
                self._bypassed.add(name)

    def run(
        self,
        factors: Mapping[str, float],
        off: Collection[Group],
        x: Tensor | None = None,
        keep: Collection[str] = (),
        halved: str = "",
    ) -> Output:
        """Run the block with other weights.

        Args:
            factors: factors of some tensors, by name.
            off: groups that are switched off.
            x: the input; None for the random one.
            keep: names of submodules whose outputs are kept.
            halved: name of a submodule whose output is multiplied by one half.
        """
        self._scale({**factors, **{name: 0.0 for group in off for name in group}})
        called: list[str] = []
        inside: dict[str, Tensor] = {}
        handles = []
        for name, child in self._body.named_modules():
            if name:
                handles.append(child.register_forward_hook(self._recorder(name, called, inside, keep)))
        if halved:
            handles.append(self._body.get_submodule(halved).register_forward_hook(_halve))
        set_random_state(self._random)
        try:
            output = self._call((self.x if x is None else x.to(self.x.dtype)).clone())
        finally:
            for handle in handles:
                handle.remove()
        value = tree_leaves(output)[0]
        if not is_continuous(value):
            raise TypeError(f"returns a {type(value).__name__}")
        # In single precision, as differences of outputs are compared.
        return Output(_single(value), called, {name: _single(output) for name, output in inside.items()})

    def _scale(self, factors: Mapping[str, float]) -> None:
        """Multiply some tensors by factors, and no others."""
        for name, original in self._originals.items():
            self._tensors[name].copy_(original)
        scaled = [name for name, factor in factors.items() if factor != 1.0]
        self._originals = {name: self._tensors[name].clone() for name in scaled}
        for name in scaled:
            self._tensors[name].mul_(factors[name])

    def _recorder(
        self, name: str, called: list[str], inside: dict[str, Tensor], keep: Collection[str]
    ) -> Callable[..., Any]:
        def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if name in self._bypassed and args and isinstance(args[0], Tensor):
                called.append(name)
                return args[0]
            first = next(iter(tree_leaves(output)), None)
            # An expert may be called with no token at all.
            if not isinstance(first, Tensor) or first.numel():
                called.append(name)
            if name in keep and is_continuous(first):
                inside[name] = first.detach().clone()
            return None

        return record


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _halve(_: nn.Module, __: Any, output: Any) -> Any:
    return tree_map_only(Tensor, lambda value: value / 2 if value.is_floating_point() else value, output)


def position(group: Group, order: Sequence[str]) -> int:
    """The position in ``order`` of the innermost submodule around some tensors that was called; -1 if none."""
    name = group[0].rpartition(".")[0]
    while name and name not in order:
        name = name.rpartition(".")[0]
    return order.index(name) if name else -1


def _groups_of(owner: str, names: Group) -> list[Group]:
    """The groups of one submodule's tensors: all of an ordinary layer's together, others one by one."""
    ordinary = {f"{owner}.{name}".lstrip(".") for name in ("weight", "bias", "gain")}
    if ordinary.issuperset(names):
        return [names] if names else []
    return [(name,) for name in names]


def between_bounds(value: Tensor) -> Tensor:
    """A mask of the entries between a tensor's bounds: without the least or greatest value if many entries share it."""
    inside = torch.ones_like(value, dtype=torch.bool)
    if not value.numel():
        return inside
    for bound in (value.min(), value.max()):
        at_bound = value == bound
        if int(at_bound.sum()) > max(1, value.numel() // 100):
            inside &= ~at_bound
    return inside


def differ_at_most(a: Tensor, b: Tensor, limit: Tensor) -> bool:
    """Whether two tensors of one shape differ nowhere by more than a limit."""
    return a.shape == b.shape and a.numel() > 0 and bool((a - b).abs().max() <= limit)
