"""Finds numerically where the residual branches of a block end, so that a scale folds into weights there.

A group of tensors, such as the weight and bias of a layer, ends a branch if the block's output is linear in a factor on
the group: output(s) = output(0) + s (output(1) - output(0)). The block runs with random weights, the same on all
workers, in single precision; in 16 bits if it has kernels for those only. Branches are found from the last to the
first: each that is found is switched off, as a later branch is no linear function of an earlier one. In the end all are
off, and the block must be the identity, or an activation or a norm of its input. Of two branches, the later one may see
the earlier one as a part of its input only.

A branch may end in a gate of itself, as in squeeze-and-excitation: z gate(W z + b) is linear in a factor on z if W is
divided by the same factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist_lightning.methods.residual import BranchEnd
from resist_lightning.methods.resist.runs import EXACT, Call, Group, Runs, between_bounds, differ_at_most, position
from resist_lightning.methods.resist.trial import random_weights, trial

_LINEAR = 1e-3
"""Largest deviation from a linear function, relative to the branch."""

_STATISTICS = (0.3, 1.7)
"""Mean and variance of norms. With 0 and 1 a norm without weights is the identity, and the layer before it an end."""

_FAR = 256.0
"""Largest factor on a group: only far from zero does a branch that is clamped or capped show it."""

_LARGE = 8.0
"""Standard deviation of the input on which ends are verified; they are searched for with 1. Large numbers clip."""


@dataclass(frozen=True)
class _End:
    """A group that ends a branch, and the weight, if any, that is divided by a factor on it."""

    group: Group
    gate: str = ""

    def factors(self, factor: float) -> dict[str, float]:
        """The factor of each tensor, by name; a group that is off needs no gate."""
        gates = {self.gate: 1 / factor} if self.gate and factor else {}
        return {**dict.fromkeys(self.group, factor), **gates}


def find_branch_ends(
    body: nn.Module,
    x: Tensor,
    call: Call,
    hint: Sequence[BranchEnd] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[BranchEnd, ...]:
    """The ends of all residual branches of a block; empty if they cannot be verified.

    Args:
        body: the block, present, as buffers matter; not compiled.
        x: an input of it, for shape and device.
        call: calls its forward with that input and copies of its other arguments, of this data type.
        hint: the ends of a block like this one, which are tried first.
        dtype: data type in which the block runs; single precision tells more than 16 bits.

    Raises:
        NotSeenError: if a part of the block does not run with this input, such as an expert that no token is sent to.
    """
    with trial(body, x.device, random_weights(), dtype=dtype, statistics=_STATISTICS):
        search = _Search(Runs(body, x.to(dtype), call), torch.finfo(dtype).eps)
        ends = [_End(end.tensors, next(iter(end.divided), "")) for end in hint]
        if not ends or not search.verify(ends):
            ends = search.search()
        if not ends or not search.verify(ends):
            return ()
        return tuple(
            BranchEnd(end.group, search.module_of(end, off=ends[:i]), (end.gate,) if end.gate else ())
            for i, end in enumerate(ends)
        )


class _Search:
    """Searches the ends of a block's branches.

    Args:
        runs: runs the block.
        eps: relative rounding error of its outputs.
    """

    def __init__(self, runs: Runs, eps: float) -> None:
        self._runs = runs
        self._eps = eps
        runs.check_all_seen()

    def search(self) -> list[_End]:
        """The ends of all branches, the last branch first; empty if switching them off leaves no identity."""
        ends: list[_End] = []
        # The latest layer comes first: where a branch has no bias, earlier ones fit as well, but surprise a reader.
        order = self._runs.run({}, ()).called
        pending = sorted(self._runs.groups, key=lambda group: position(group, order), reverse=True)
        while True:
            found = self._next(pending, ends, order)
            if found is None:
                break
            pending.remove(found.group)
            # An end without effect when the new one is off is part of its branch, and no end of its own.
            ends = [end for end in ends if not self._within(end, found)]
            ends.append(found)
        return ends if ends and self._runs.is_identity(self._runs.x, _groups(ends)) else []

    def verify(self, ends: Sequence[_End]) -> bool:
        """Whether these end all branches of the block, the last branch first, for large inputs too."""
        if not all(self._runs.has(end.factors(1.0)) for end in ends):
            return False
        x = self._runs.x * _LARGE
        for index, end in enumerate(ends):
            later = ends[:index]
            if not self._is_linear(end, later, x, self._runs.run({}, _groups(later), x).value, far=True):
                return False
        if not self._runs.is_identity(x, _groups(ends)):
            return False
        return all(self._apart(end, later, ends) for index, end in enumerate(ends) for later in ends[:index])

    def module_of(self, end: _End, off: Sequence[_End]) -> str | None:
        """Name of the innermost submodule whose output a factor on ``end`` scales, for a hook there; else None.

        Without a gate it is the tensors' own submodule or one around it; with a gate, one that returns after the gate.
        """
        own = end.group[0].rpartition(".")[0]
        tried = [name for name in reversed(self._runs.names) if name and f"{own}.".startswith(f"{name}.")]
        if end.gate:
            order = self._runs.run({}, _groups(off)).called
            tried = list(order[position((end.gate,), order) + 1 :])
        full = self._runs.run({}, _groups(off), keep=tried)
        half = self._runs.run(end.factors(0.5), _groups(off), keep=tried)
        branch = full.value - self._runs.run(end.factors(0.0), _groups(off)).value
        for name in tried:
            output = full.inside.get(name)
            if output is None or not differ_at_most(half.inside[name], output / 2, self._limit(output, output)):
                continue
            hooked = self._runs.run({}, _groups(off), halved=name).value
            if differ_at_most(hooked, half.value, self._limit(branch, full.value)):
                return name
        return None

    def _next(self, pending: list[Group], off: Sequence[_End], order: Sequence[str]) -> _End | None:
        """The last end that is not off, if possible without a gate; removes groups without effect from ``pending``."""
        full = self._runs.run({}, _groups(off)).value
        for group in list(pending):
            linear = self._is_linear(_End(group), off, self._runs.x, full)
            if linear:
                return _End(group)
            if linear is None:  # it feeds only branches that are off
                pending.remove(group)
        for group in pending:
            gated = _End(group, self._runs.gate_after(group, order))
            if gated.gate and self._is_linear(gated, off, self._runs.x, full):
                return gated
        return None

    def _apart(self, end: _End, later: _End, ends: Sequence[_End]) -> bool:
        """Whether a later branch sees an earlier one in its input only, or not at all; all others are off.

        Else the earlier end is a part of the later branch too, inside which nothing must be scaled.
        """
        rest = _groups([other for other in ends if other not in (end, later)])
        neither = self._runs.run({}, _groups(ends)).value
        alone = self._runs.run(end.factors(0.5), [*rest, later.group]).value
        other = self._runs.run({}, [*rest, end.group]).value
        both = self._runs.run(end.factors(0.5), rest).value
        limit = self._limit(both - neither, both)
        # Side by side, the two add up.
        inside = between_bounds(both) & between_bounds(other) & between_bounds(alone) & between_bounds(neither)
        if differ_at_most((both - other)[inside], (alone - neither)[inside], limit):
            return True
        # One after the other, the later branch takes the sum for its input, wherever it comes from.
        return differ_at_most(both, self._runs.run({}, [*rest, end.group], alone).value, limit)

    def _within(self, end: _End, other: _End) -> bool:
        """Whether an end has no effect where another one is off."""
        without = self._runs.run({}, [other.group]).value
        return differ_at_most(self._runs.run({}, [other.group, end.group]).value, without, EXACT * without.abs().max())

    def _is_linear(self, end: _End, off: Sequence[_End], x: Tensor, full: Tensor, *, far: bool = False) -> bool | None:
        """Whether the output is linear in a factor on an end; None if it does not depend on it at all.

        Args:
            end: the end.
            off: ends that are switched off.
            x: the input.
            full: the output with a factor of one.
            far: whether a large factor is tried too.
        """
        none = self._runs.run(end.factors(0.0), _groups(off), x).value
        branch = full - none
        if bool(branch.abs().max() <= EXACT * full.abs().max()):
            return None
        half = self._runs.run(end.factors(0.5), _groups(off), x).value
        # A clipping activation behind the sum is the identity between its bounds.
        inside = between_bounds(none) & between_bounds(half) & between_bounds(full)
        if inside.float().mean() < 0.1:
            return False
        if not differ_at_most((half - none)[inside], branch[inside] / 2, self._limit(branch[inside], full)):
            return False
        if not far:
            return True
        much = self._runs.run(end.factors(_FAR), _groups(off), x).value
        inside &= between_bounds(much)
        if not bool(inside.any()):
            return False
        expected = _FAR * branch[inside]
        return differ_at_most((much - none)[inside], expected, self._limit(expected, expected))

    def _limit(self, branch: Tensor, output: Tensor) -> Tensor:
        """Largest allowed difference between two ways to compute a branch, each a difference of outputs."""
        return _LINEAR * branch.abs().max() + 4 * self._eps * output.abs().max()


def _groups(ends: Sequence[_End]) -> list[Group]:
    return [end.group for end in ends]
