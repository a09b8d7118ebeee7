"""Finds out what an optimizer keeps, by trying a twin of it on small parameters: in its state, its groups, itself."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.comm.group import messages_sent
from resist_lightning.state.random_state import random_numbers_apart

STEPS = 3
"""Of a trial: some optimizers make a part of their state in the second step."""

_SIDES = ((), (36,), (36, 48))  # of small parameters; some optimizers keep other things of matrices with short sides
_MORE_SIDES = (5, 4, 3, 2)
_SCHEDULED = ("params", "lr", "initial_lr")
_NUMBERS = (bool, int, float)

Kind: TypeAlias = tuple[int, int]
"""A parameter group's number, and the number of a parameter's dimensions."""

_Numbers: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Slot:
    """What an optimizer keeps of a parameter under one name.

    Args:
        shaped: whether it has the shape of its parameter; else it is one number.
        dtype: of the tensor that it is, or travels as.
        device: where a tensor of one number lives.
        number: the class of a Python number; None for a tensor.
        copies_weights: whether it follows the weights themselves, so that zeros are no beginning.
    """

    shaped: bool
    dtype: torch.dtype
    device: torch.device
    number: type | None = None
    copies_weights: bool = False

    def empty(self, parameter: Tensor, device: torch.device) -> Tensor:
        """Zeros for a parameter; on the meta device only their shape and data type."""
        if not self.shaped:
            return torch.zeros((), dtype=self.dtype, device=device if device.type == "meta" else self.device)
        if device.type == "meta":
            return torch.empty(parameter.shape, dtype=self.dtype, device=device)
        return torch.zeros_like(parameter.detach(), dtype=self.dtype, memory_format=torch.preserve_format)

    def bytes(self, parameter: Tensor) -> int:
        """Of this slot of a parameter."""
        return (parameter.numel() if self.shaped else 1) * self.dtype.itemsize


@dataclass
class Findings:
    """What one optimizer keeps.

    Attributes:
        slots: of each kind of parameter, by name.
        odd: names of what has another shape than its parameter, or is neither a tensor nor a number.
        group: names of the values in parameter groups that its steps change.
        attributes: names of its own numbers that its steps change.
        estimates: those of the last two that follow the gradients.
        unknown: why no trial succeeded; empty if one did.
    """

    slots: dict[Kind, dict[str, Slot]] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    group: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    estimates: list[str] = field(default_factory=list)
    unknown: str = ""


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it has inside, as Lookahead and SAM do."""
    found = [optimizer]
    for value in vars(optimizer).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for inner in values:
            if isinstance(inner, Optimizer):
                found += [other for other in with_inner(inner) if all(other is not o for o in found)]
    return found


def probe(optimizer: Optimizer) -> list[Findings]:
    """What an optimizer, and each one inside of it, keeps. Touches neither it nor its parameters nor a generator.

    Raises:
        ValueError: for an optimizer that cannot work with absent parameters, or that talks to other workers.
    """
    name = type(optimizer).__name__
    if any(isinstance(each, torch.optim.LBFGS) for each in with_inner(optimizer)):
        raise ValueError(f"{name} flattens all parameters into one vector, and a worker does not have them all.")
    count, before = len(with_inner(optimizer)), messages_sent()
    try:
        with random_numbers_apart(), torch.compiler.set_stance("force_eager"):
            trial = _try(optimizer)
            other_gradient, other_weight = _try(optimizer, gradient=-2.0), _try(optimizer, weight=1000.0)
    except Exception as error:
        if optimizer.state and isinstance(error, KeyError | AttributeError | TypeError):
            raise ValueError(
                f"{name} makes its state when it is built and cannot restart without it (missing: {error}); choose an "
                "optimizer that makes its state in the first step, such as SGD or AdamW."
            ) from error
        return [Findings(unknown=f"{type(error).__name__}: {error}") for _ in range(count)]
    if messages_sent() != before:
        raise ValueError(
            f"{name} talks to other workers in its step, which would mix their weights between two syncs. Choose an "
            "optimizer of one process."
        )
    return [_compare(trial, other_gradient, other_weight, place) for place in range(count)]


class _Trial:
    """A twin of an optimizer, with one small parameter for each kind of parameter that it has."""

    def __init__(self, optimizer: Optimizer, gradient: float, weight: float) -> None:
        self._gradient = gradient
        self._weight = weight
        memo: dict[int, Any] = {}
        real = with_inner(optimizer)
        for each in real:
            self._small_groups(each, memo)
        self.optimizers = [_bare(each, memo) for each in real]
        for each, twin in zip(real, self.optimizers, strict=True):
            _fill(each, twin, memo)
        self._parameters = [p for twin in self.optimizers for group in twin.param_groups for p in group["params"]]
        self.before: list[_Numbers] = []
        self.after: list[_Numbers] = []

    def take_steps(self, closure: Callable[[], Tensor] | None) -> None:
        """As training would."""
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
        step: Any = type(twin).step  # not twin.step: a scheduler replaces that by one bound to the original
        step(twin) if closure is None else step(twin, closure)

    def set_gradients(self) -> Tensor:
        """A closure."""
        for parameter in self._parameters:
            ramp = torch.linspace(1.0, 2.0, parameter.numel(), device=parameter.device).view(parameter.shape)
            parameter.grad = (self._gradient * 0.01 * ramp).to(parameter.dtype)
        return torch.ones(())

    def _small_groups(self, optimizer: Optimizer, memo: dict[int, Any]) -> None:
        """Copies of the groups; whatever refers to a parameter, or to a group, will refer to its copy."""
        if id(optimizer.param_groups) in memo:
            return
        groups = memo[id(optimizer.param_groups)] = []
        for group in optimizer.param_groups:
            small: dict[int, nn.Parameter] = {}
            for parameter in group["params"]:
                dummy = memo.get(id(parameter))
                if dummy is None:
                    dummy = small.get(parameter.dim())
                if dummy is None:
                    dummy = self._small(parameter)
                small[parameter.dim()] = memo[id(parameter)] = dummy
            if id(group) not in memo:
                memo[id(group)] = {key: _copy(value, memo) for key, value in group.items() if key != "params"}
                memo[id(group)]["params"] = list(small.values())
            groups.append(memo[id(group)])

    def _small(self, parameter: nn.Parameter) -> nn.Parameter:
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        count = parameter.dim()
        sides = _SIDES[count] if count < len(_SIDES) else (*_MORE_SIDES, *[1] * count)[:count]
        return nn.Parameter(torch.full(sides, 0.5 + self._weight, dtype=parameter.dtype, device=device))


def _try(optimizer: Optimizer, gradient: float = 1.0, weight: float = 0.0) -> _Trial:
    """A trial, with a closure if it fails without one."""
    trial = _Trial(optimizer, gradient, weight)
    try:
        trial.take_steps(None)
        return trial
    except Exception as error:  # noqa: BLE001 - whatever a stranger's code may raise
        first = error
    trial = _Trial(optimizer, gradient, weight)
    try:
        trial.take_steps(trial.set_gradients)
    except Exception:  # noqa: BLE001
        raise first from None  # it says more: few steps need a closure
    return trial


def _bare(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """An object of the same class; not ``copy.copy``, by which torch's optimizers lose their attributes."""
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    memo[id(optimizer.state)] = defaultdict(dict)
    return twin


def _fill(optimizer: Optimizer, twin: Optimizer, memo: dict[int, Any]) -> None:
    """Everything but hooks, and the step that a scheduler has put there."""
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    for name, value in vars(optimizer).items():
        if name != "step":
            vars(twin)[name] = OrderedDict() if name in hooks else _copy(value, memo)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - locks, process groups, tensors of a graph
        return value


def _compare(trial: _Trial, gradient: _Trial, weight: _Trial, place: int) -> Findings:
    """What the steps of three trials have made and changed, of the optimizer in this place."""
    found = Findings()
    twin, shifted = trial.optimizers[place], weight.optimizers[place]
    for number, group in enumerate(twin.param_groups):
        for small, other in zip(group["params"], shifted.param_groups[number]["params"], strict=True):
            state, copies = twin.state.get(small, {}), shifted.state.get(other, {})
            slots = {name: _slot(small, value, copies.get(name)) for name, value in state.items() if value is not None}
            found.odd += [name for name, slot in slots.items() if slot is None and name not in found.odd]
            found.slots[number, small.dim()] = {name: slot for name, slot in slots.items() if slot is not None}
    before, after, otherwise = trial.before[place], trial.after[place], gradient.after[place]
    changed: list[str] = []
    for one, two, three in zip(before, after, otherwise, strict=True):
        names = [name for name, value in two.items() if name not in one or not _same(one[name], value)]
        found.estimates += [name for name in names if not _same(two[name], three.get(name)) and name not in changed]
        changed += names
        (found.attributes if two is after[-1] else found.group).extend(names)
    found.group = list(dict.fromkeys(found.group))
    return found


def _numbers(optimizer: Optimizer) -> _Numbers:
    """Copies of what its steps may change besides its state: of each group, and at last its own numbers."""
    groups = [
        {name: _copy(value, {}) for name, value in g.items() if name not in _SCHEDULED} for g in optimizer.param_groups
    ]
    return [*groups, {name: value for name, value in vars(optimizer).items() if _is_number(value)}]


def _slot(small: Tensor, value: Any, shifted: Any) -> Slot | None:
    """None for what is neither a number nor a tensor in the shape of its parameter."""
    if _is_number(value):
        return Slot(False, torch.float64, torch.device("cpu"), type(value))
    if not isinstance(value, Tensor) or (value.dim() and value.shape != small.shape):
        return None
    shaped = value.dim() > 0
    copies = shaped and isinstance(shifted, Tensor) and bool(((shifted - value).abs() > 500).any())
    return Slot(shaped, value.dtype, value.device, copies_weights=copies)


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS


def _same(one: Any, other: Any) -> bool:
    ones, others = list(_leaves(one)), list(_leaves(other))
    return len(ones) == len(others) and all(_equal(a, b) for a, b in zip(ones, others, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and (one is other or bool(one == other))


def _leaves(value: Any) -> Iterator[Any]:
    items: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    )
    if isinstance(value, dict | list | tuple):
        for item in items:
            yield from _leaves(item)
    else:
        yield value
