"""A twin of an optimizer that takes trial steps on small parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.comm.tensors import is_continuous

STEPS = 3
"""Steps of a trial; some optimizers make a part of their state in the second step."""

FIRST_WEIGHT = 0.5
"""Weight of the small parameters, before a trial adds its own."""

# Shapes of small parameters by dimension. Long sides, as some optimizers keep less for matrices with short ones.
_SIDES = ((), (36,), (36, 48))
_MORE_SIDES = (5, 4, 3, 2)
_SCHEDULED = ("params", "lr", "initial_lr")  # values of a group that schedules change, not steps
_NUMBERS = (bool, int, float)

Numbers: TypeAlias = list[dict[str, Any]]

Kind: TypeAlias = tuple[int, torch.dtype]
"""The number of a parameter's dimensions, and its data type, which is that of its state."""


def kind_of(parameter: Tensor) -> Kind:
    """The kind of a parameter: those of one kind in one group have the same slots."""
    return parameter.dim(), parameter.dtype


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and its inner ones, as Lookahead and SAM have."""
    found = [optimizer]
    for value in vars(optimizer).values():
        for inner in items_of(value):
            if not isinstance(inner, Optimizer):
                continue
            for other in with_inner(inner):
                # Compared by identity: an optimizer may define equality.
                if all(other is not known for known in found):
                    found.append(other)
    return found


def _gets_gradients(parameter: Tensor) -> bool:
    """Whether torch computes gradients in a parameter's data type: not in integers and 8-bit floats."""
    return is_continuous(parameter.dtype) and parameter.element_size() > 1


class Trial:
    """A twin of an optimizer, with one small parameter for each :func:`kind_of` parameter that it has.

    Args:
        optimizer: the original.
        device: where the small parameters of parameters without memory live.
        gradient: factor of the gradients.
        weight: added to the weights.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, gradient: float, weight: float) -> None:
        self._device = device
        self._gradient = gradient
        self._weight = weight
        # As for `copy.deepcopy`: by the identity of an object, its copy.
        memo: dict[int, Any] = {}
        real = with_inner(optimizer)
        # First all groups and empty twins, as the attributes that are copied last refer to them.
        for each in real:
            self._small_groups(each, memo)
        self.optimizers = [_bare(each, memo) for each in real]
        for each, twin in zip(real, self.optimizers, strict=True):
            _fill(each, twin, memo)
        self._parameters: list[nn.Parameter] = []
        for twin in self.optimizers:
            for group in twin.param_groups:
                self._parameters += group["params"]
        self.before: list[Numbers] = []
        self.after: list[Numbers] = []

    def take_steps(self, closure: Callable[[], Tensor] | None) -> None:
        """Take steps as training would."""
        for each in self.optimizers:
            train: Any = getattr(type(each), "train", None)
            if callable(train):  # schedule-free optimizers have modes
                train(each)
        self.before = [_numbers(each) for each in self.optimizers]
        for _ in range(STEPS):
            self._step(closure)
        self.after = [_numbers(each) for each in self.optimizers]

    def _step(self, closure: Callable[[], Tensor] | None) -> None:
        self.set_gradients()
        twin: Any = self.optimizers[0]
        # Not `twin.step`, which a scheduler has replaced by one that is bound to the original.
        step: Any = type(twin).step
        if closure is None:
            step(twin)
        else:
            step(twin, closure)

    def set_gradients(self) -> Tensor:
        """Set all gradients; also a closure for the step."""
        for parameter in filter(_gets_gradients, self._parameters):
            ramp = torch.linspace(1.0, 2.0, parameter.numel(), device=parameter.device)
            gradient = self._gradient * 0.01 * ramp
            parameter.grad = gradient.view(parameter.shape).to(parameter.dtype)
        return torch.ones(())

    def _small_groups(self, optimizer: Optimizer, memo: dict[int, Any]) -> None:
        """Copy the groups, with one small parameter for each kind."""
        # By `memo`, whatever refers to a parameter or a group will refer to its copy, as in `copy.deepcopy`.
        if id(optimizer.param_groups) in memo:
            return
        groups = memo[id(optimizer.param_groups)] = []
        for group in optimizer.param_groups:
            small: dict[Kind, nn.Parameter] = {}
            for parameter in group["params"]:
                # The same one where another optimizer has the parameter too.
                dummy = memo.get(id(parameter))
                if dummy is None:
                    dummy = small.get(kind_of(parameter))
                if dummy is None:
                    dummy = self._small(parameter)
                small[kind_of(parameter)] = dummy
                memo[id(parameter)] = dummy
            if id(group) not in memo:
                copied = {key: _copy(value, memo) for key, value in group.items() if key != "params"}
                memo[id(group)] = {**copied, "params": list(small.values())}
            groups.append(memo[id(group)])

    def _small(self, parameter: nn.Parameter) -> nn.Parameter:
        device = self._device if parameter.is_meta else parameter.device
        count = parameter.dim()
        if count < len(_SIDES):
            sides: tuple[int, ...] = _SIDES[count]
        else:
            sides = (*_MORE_SIDES, *[1] * count)[:count]
        if not _gets_gradients(parameter):
            empty = torch.zeros(sides, dtype=parameter.dtype, device=device)
            return nn.Parameter(empty, requires_grad=False)
        return nn.Parameter(torch.full(sides, FIRST_WEIGHT + self._weight, dtype=parameter.dtype, device=device))


def take_trial_steps(optimizer: Optimizer, device: torch.device, gradient: float = 1.0, weight: float = 0.0) -> Trial:
    """Take trial steps, with a closure if they fail without one; see :class:`Trial`."""
    trial = Trial(optimizer, device, gradient, weight)
    try:
        trial.take_steps(None)
        return trial
    except Exception as error:  # noqa: BLE001 - whatever the optimizer's code may raise
        first = error
    trial = Trial(optimizer, device, gradient, weight)
    try:
        trial.take_steps(trial.set_gradients)
    except Exception:  # noqa: BLE001
        raise first from None  # few steps need a closure, so the first error says more
    return trial


def _bare(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """An empty object of the same class, registered as the twin of ``optimizer``."""
    # Not by `copy.copy`, in which torch's optimizers lose their attributes.
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    memo[id(optimizer.state)] = defaultdict(dict)
    return twin


def _fill(optimizer: Optimizer, twin: Optimizer, memo: dict[int, Any]) -> None:
    """Copy all attributes but hooks, and the ``step`` of a scheduler."""
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    for name, value in vars(optimizer).items():
        if name in hooks:
            vars(twin)[name] = OrderedDict()
        elif name != "step":
            vars(twin)[name] = _copy(value, memo)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - locks, process groups, tensors of a graph
        return value


def _numbers(optimizer: Optimizer) -> Numbers:
    """Copies of values that steps may change besides state: those of each group, and last the optimizer's numbers."""
    found: Numbers = []
    for group in optimizer.param_groups:
        names = [name for name in group if name not in _SCHEDULED]
        found.append({name: _copy(group[name], {}) for name in names})
    attributes = vars(optimizer)
    found.append({name: value for name, value in attributes.items() if is_number(value)})
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a plain Python number."""
    return type(value) in _NUMBERS


def items_of(value: Any) -> Iterable[Any]:
    """The elements of a container; of anything else, itself."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]
