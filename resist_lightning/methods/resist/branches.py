"""Finds by numbers where the residual branches of a block end, so that a scale folds into weights there.

A group of tensors, such as the weight and bias of a layer, ends a branch if the block's output is linear in a factor on
the group: output(s) = output(0) + s (output(1) - output(0)). The block runs with random weights of single precision,
the same on all workers. Branches are found from the last to the first: each that is found
is switched off, as a later branch is no linear function of an earlier one. In the end all are off, and the block must
be the identity, or an activation or a norm of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resist_lightning.methods.residual import BranchEnd
from resist_lightning.methods.resist.bypass import is_continuous
from resist_lightning.methods.resist.trial import is_norm, own_tensors, random_weights, trial
from resist_lightning.state.random_state import random_state, set_random_state

_LINEAR = 1e-3
"""Largest deviation from a linear function, in relation to the branch."""

_EXACT = 1e-5
"""Largest deviation from the identity, in relation to the input; and the least change that counts as one."""

_STATISTICS = (0.3, 1.7)
"""Of norms. With 0 and 1 a norm without weights would be the identity, and the layer before it would seem to end."""

_FAR = 256.0
"""Largest factor on a group: only far from zero does a branch that is clamped or capped show it."""

_LARGE = 8.0
"""Standard deviation of the input on which ends are verified; they are searched for with 1. Large numbers clip."""

Call: TypeAlias = Callable[[Tensor], Any]
Group: TypeAlias = tuple[str, ...]
"""Names, within the block, of tensors of one submodule."""


class NotSeenError(Exception):
    """A part of a block did not run, so that nothing is known of what it adds."""


@dataclass(frozen=True)
class _Output:
    """What a run has shown: the block's output, and of the submodules those that were called, with some outputs."""

    value: Tensor
    called: Sequence[str]
    inside: Mapping[str, Tensor]


def find_branch_ends(body: nn.Module, x: Tensor, call: Call, hint: Sequence[BranchEnd] = ()) -> tuple[BranchEnd, ...]:
    """The ends of all residual branches of a block; empty if they cannot be verified.

    Args:
        body: the block, present, as buffers matter; not compiled.
        x: an input of it, for shape and device.
        call: calls its forward with that input and copies of its other arguments, in single precision.
        hint: the ends of a block like this one, which are tried first.

    Raises:
        NotSeenError: if a part of the block does not run with this input, such as an expert that no token is sent to.
    """
    with trial(body, x.device, random_weights(), dtype=torch.float32, statistics=_STATISTICS):
        runs = _Runs(body, x, call)
        runs.check_all_seen()
        ends = [end.tensors for end in hint]
        if not ends or not runs.verify(ends):
            ends = runs.search()
        if not ends or not runs.verify(ends):
            return ()
        return tuple(BranchEnd(group, runs.module_of(group, off=ends[:i])) for i, group in enumerate(ends))


class _Runs:
    """Runs a block with factors on some of its tensors."""

    def __init__(self, body: nn.Module, x: Tensor, call: Call) -> None:
        self._body = body
        self._call = call
        self._tensors: dict[str, Tensor] = {}
        self._groups: list[Group] = []
        self._names = [name for name, _ in body.named_modules()]
        for owner, child in body.named_modules():
            own = {f"{owner}.{name}".lstrip("."): tensor for name, tensor in own_tensors(child).items()}
            self._tensors.update(own)
            self._groups.extend(_groups_of(owner, tuple(own)))
        self._originals = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._factors = dict.fromkeys(self._tensors, 1.0)
        # Every run begins with the same numbers, for forwards that draw some although they are told to evaluate.
        self._random = random_state()
        generator = torch.Generator().manual_seed(1)
        self._x = torch.randn(x.shape, generator=generator).to(x.device)
        self._bypassed: set[str] = set()
        self._bypass_norms_of_the_skip()

    def check_all_seen(self) -> None:
        """Raise a NotSeenError if a submodule with tensors is not called, and its tensors have no effect either."""
        full = self._run({}, ())
        for group in self._groups:
            owner = group[0].rpartition(".")[0]
            if not owner or owner in full.called:
                continue
            # Some layers are not called, but read by the module around them.
            without = self._run(dict.fromkeys(group, 0.0), ()).value
            if _differ_at_most(without, full.value, _EXACT * full.value.abs().max()):
                raise NotSeenError(f"{group[0]} was not used")

    def search(self) -> list[Group]:
        """The groups that end a branch, the last branch first; empty if switching them off leaves no identity."""
        ends: list[Group] = []
        # The latest layer comes first: where a branch has no bias, earlier ones are as good, but surprise a reader.
        order = self._run({}, ()).called
        pending = sorted(self._groups, key=lambda group: _position(group, order), reverse=True)
        found = True
        while found:
            found = False
            full = self._run({}, ends).value
            for group in list(pending):
                linear = self._is_linear(group, ends, self._x, full)
                if linear is None:  # it feeds only branches that are off
                    pending.remove(group)
                elif linear:
                    ends.append(group)
                    pending.remove(group)
                    found = True
                    break
        return ends if ends and self._is_identity(self._x, ends) else []

    def verify(self, ends: Sequence[Group]) -> bool:
        """Whether these groups end all branches of the block, the last branch first, for large inputs too."""
        if not all(name in self._tensors for group in ends for name in group):
            return False
        x = self._x * _LARGE
        for index, group in enumerate(ends):
            later = ends[:index]
            if not self._is_linear(group, later, x, self._run({}, later, x).value, far=True):
                return False
        return self._is_identity(x, ends)

    def module_of(self, group: Group, off: Sequence[Group]) -> str | None:
        """Name of the innermost submodule, the tensors' own or one around it, whose output they scale."""
        name = group[0].rpartition(".")[0]
        around = [part for part in self._names if part and f"{name}.".startswith(f"{part}.")]
        full = self._run(dict.fromkeys(group, 1.0), off, keep=around)
        half = self._run(dict.fromkeys(group, 0.5), off, keep=around)
        while name:
            output = full.inside.get(name)
            if output is not None and _differ_at_most(half.inside[name], output / 2, _LINEAR * output.abs().max()):
                return name
            name = name.rpartition(".")[0]
        return None

    def _is_linear(
        self, group: Group, off: Sequence[Group], x: Tensor, full: Tensor, *, far: bool = False
    ) -> bool | None:
        """Whether the output is linear in a factor on a group; None if it does not depend on it at all.

        Args:
            group: the group.
            off: groups that are switched off.
            x: the input.
            full: the output with a factor of one.
            far: whether a large factor is tried too.
        """
        none = self._run(dict.fromkeys(group, 0.0), off, x).value
        branch = full - none
        if bool(branch.abs().max() <= _EXACT * full.abs().max()):
            return None
        half = self._run(dict.fromkeys(group, 0.5), off, x).value
        # A clipping activation behind the sum is the identity between its bounds.
        inside = _between_bounds(none) & _between_bounds(half) & _between_bounds(full)
        if inside.float().mean() < 0.1:
            return False
        if not _differ_at_most((half - none)[inside], branch[inside] / 2, _LINEAR * branch[inside].abs().max()):
            return False
        if not far:
            return True
        much = self._run(dict.fromkeys(group, _FAR), off, x).value
        inside &= _between_bounds(much)
        if not bool(inside.any()):
            return False
        expected = _FAR * branch[inside]
        return _differ_at_most((much - none)[inside], expected, _LINEAR * expected.abs().max())

    def _is_identity(self, x: Tensor, off: Collection[Group]) -> bool:
        """Whether the block without its branches returns its input, or an activation of it that only clips."""
        value = self._run({}, off, x).value
        if value.shape != x.shape:
            return False
        inside = _between_bounds(value)
        enough = bool(inside.float().mean() > 0.1)
        return enough and _differ_at_most(value[inside], x[inside], _EXACT * x.abs().max())

    def _bypass_norms_of_the_skip(self) -> None:
        """Let norms that lie on the skip path itself, behind a sum, return their input."""
        if self._is_identity(self._x, self._groups):
            return
        other = self._x.flip(0) + 1
        for name, child in self._body.named_modules():
            if not name or not is_norm(child) or not own_tensors(child):
                continue
            off = [tuple(f"{name}.{tensor}" for tensor in own_tensors(child))]
            # Nothing of the input is left behind a norm that is switched off, so there is no way around it.
            here, there = self._run({}, off).value, self._run({}, off, other).value
            if _differ_at_most(here, there, _EXACT * self._x.abs().max()):
                self._bypassed.add(name)

    def _run(
        self,
        factors: Mapping[str, float],
        off: Collection[Group],
        x: Tensor | None = None,
        keep: Collection[str] = (),
    ) -> _Output:
        """Run the block with factors on some tensors, and none of others; keep the outputs of some submodules."""
        scales = {**factors, **{name: 0.0 for group in off for name in group}}
        for name, tensor in self._tensors.items():
            factor = scales.get(name, 1.0)
            if factor != self._factors[name]:
                tensor.copy_(self._originals[name] * factor)
                self._factors[name] = factor
        called: list[str] = []
        inside: dict[str, Tensor] = {}
        handles = []
        for name, child in self._body.named_modules():
            if name:
                handles.append(child.register_forward_hook(self._recorder(name, called, inside, keep)))
        set_random_state(self._random)
        try:
            output = self._call((self._x if x is None else x).clone())
        finally:
            for handle in handles:
                handle.remove()
        value = tree_leaves(output)[0]
        if not is_continuous(value):
            raise TypeError(f"returns a {type(value).__name__}")
        return _Output(value, called, inside)

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


def _position(group: Group, order: Sequence[str]) -> int:
    """When the innermost submodule around some tensors has returned, among those that were called."""
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


def _between_bounds(value: Tensor) -> Tensor:
    """Where a tensor has neither its least nor its greatest value, if many entries share it, as clipping does."""
    inside = torch.ones_like(value, dtype=torch.bool)
    if not value.numel():
        return inside
    for bound in (value.min(), value.max()):
        at_bound = value == bound
        if int(at_bound.sum()) > max(1, value.numel() // 100):
            inside &= ~at_bound
    return inside


def _differ_at_most(a: Tensor, b: Tensor, limit: Tensor) -> bool:
    return a.shape == b.shape and a.numel() > 0 and bool((a - b).abs().max() <= limit)
