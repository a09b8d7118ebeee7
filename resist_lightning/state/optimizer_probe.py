"""Finds the state that an optimizer keeps, by trial steps of a twin on small parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from resist_lightning.comm.group import messages_sent
from resist_lightning.comm.tensors import computable, is_continuous
from resist_lightning.state.optimizer_twin import (
    FIRST_WEIGHT,
    Kind,
    Numbers,
    Trial,
    is_number,
    items_of,
    kind_of,
    take_trial_steps,
    with_inner,
)
from resist_lightning.state.random_state import random_numbers_apart

_NOTHING = 1e-6  # Adamax adds its eps to a maximum that is zero otherwise


@dataclass(frozen=True)
class Slot:
    """An entry of a parameter's optimizer state, e.g. ``exp_avg``.

    Args:
        shaped: whether it has the shape of its parameter; else it is one number.
        dtype: data type of the tensor that it is, or travels as.
        device: where a tensor of one number lives.
        number: the type of a Python number; None for a tensor.
        copies_weights: whether it follows the weights themselves, so that it cannot begin with zeros.
        begins_filled: whether it begins with other values than zeros, such as Rprop's step sizes.
    """

    shaped: bool
    dtype: torch.dtype
    device: torch.device
    number: type | None = None
    copies_weights: bool = False
    begins_filled: bool = False

    def empty(self, parameter: Tensor, device: torch.device) -> Tensor:
        """Zeros for a parameter; on the meta device only their shape and data type."""
        absent = device.type == "meta"
        if not self.shaped:
            return torch.zeros((), dtype=self.dtype, device=device if absent else self.device)
        if absent:
            return torch.empty(parameter.shape, dtype=self.dtype, device=device)
        return torch.zeros_like(parameter.detach(), dtype=self.dtype, memory_format=torch.preserve_format)

    def first(self, parameter: Tensor) -> Tensor:
        """The value for a present parameter that has not stepped yet."""
        zeros = self.empty(parameter, parameter.device)
        return zeros.copy_(parameter.detach()) if self.copies_weights else zeros

    def bytes(self, parameter: Tensor) -> int:
        """Bytes of this slot for a parameter."""
        return (parameter.numel() if self.shaped else 1) * self.dtype.itemsize


@dataclass
class Findings:
    """State of one optimizer, as found by trial steps.

    Attributes:
        slots: for each group number and kind of parameter, the slots of its state by name.
        odd: names of state that has another shape than its parameter, or is neither a tensor nor a number.
        group: names of the values in parameter groups that steps change.
        attributes: names of the optimizer's own numbers that steps change.
        estimates: names from ``group`` and ``attributes`` whose values depend on the gradients.
        unknown: the error of the trial steps; empty if they succeeded.
    """

    slots: dict[tuple[int, Kind], dict[str, Slot]] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    group: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    estimates: list[str] = field(default_factory=list)
    unknown: str = ""

    def not_from_zeros(self) -> Iterator[tuple[str, str]]:
        """Names of the slots that zeros would be wrong for, and the reason in words."""
        for slots in self.slots.values():
            for name, slot in slots.items():
                if slot.copies_weights:
                    yield name, "is a copy of the weights"
                elif slot.begins_filled:
                    yield name, "begins with other values than zeros"


def probe(optimizer: Optimizer, device: torch.device) -> list[Findings]:
    """Findings on an optimizer and each inner one. Changes neither it nor its parameters nor a random generator.

    Args:
        optimizer: the user's.
        device: where parameters that have no memory yet will live.

    Raises:
        ValueError: for an optimizer that cannot work with absent parameters, or that talks to other workers.
    """
    name = type(optimizer).__name__
    optimizers = with_inner(optimizer)
    if any(isinstance(each, torch.optim.LBFGS) for each in optimizers):
        raise ValueError(
            f"{name} flattens all parameters into one vector, but its state must be kept, moved and reset by "
            "parameter. Use SGD, AdamW or the like."
        )
    messages_before = messages_sent()
    try:
        with random_numbers_apart(), torch.compiler.set_stance("force_eager"):
            trial = take_trial_steps(optimizer, device)
            # State that differs in these depends on the gradients, or copies the weights.
            other_gradient = take_trial_steps(optimizer, device, gradient=-2.0)
            other_weight = take_trial_steps(optimizer, device, weight=1000.0)
            at_rest = _at_rest(optimizer, device)
    except Exception as error:
        if optimizer.state and isinstance(error, KeyError | AttributeError | TypeError):
            raise ValueError(
                f"{name} makes its state when it is built and cannot restart without it (missing: {error}); choose an "
                "optimizer that makes its state in the first step, such as SGD or AdamW."
            ) from error
        return [Findings(unknown=f"{type(error).__name__}: {error}") for _ in optimizers]
    if messages_sent() != messages_before:
        raise ValueError(
            f"{name} communicates with other workers in its step, which would mix their weights between two syncs. "
            "Choose an optimizer that does not."
        )
    found = []
    for place in range(len(optimizers)):
        findings = _compare(trial, other_gradient, other_weight, place)
        if at_rest is not None:
            _find_filled(findings, at_rest.optimizers[place])
        found.append(findings)
    return found


def _at_rest(optimizer: Optimizer, device: torch.device) -> Trial | None:
    """A trial with gradients and weights of zero, after which state has the values that it began with.

    None where such steps fail, as by a division; the optimizer may be sound all the same.
    """
    try:
        return take_trial_steps(optimizer, device, gradient=0.0, weight=-FIRST_WEIGHT)
    except Exception:  # noqa: BLE001 - whatever the optimizer's code may raise
        return None


def _compare(trial: Trial, gradient: Trial, weight: Trial, place: int) -> Findings:
    """Findings on the optimizer at ``place``, from the steps of three trials."""
    found = Findings()
    _find_slots(found, trial.optimizers[place], weight.optimizers[place])
    _find_numbers(found, trial.before[place], trial.after[place], gradient.after[place])
    return found


def _find_slots(found: Findings, twin: Optimizer, shifted: Optimizer) -> None:
    """Find the slots of a twin's state; ``shifted`` took the same steps with larger weights."""
    for number, group in enumerate(twin.param_groups):
        others = shifted.param_groups[number]["params"]
        for small, other in zip(group["params"], others, strict=True):
            slots = found.slots[number, kind_of(small)] = {}
            shifted_state = shifted.state.get(other, {})
            for name, value in twin.state.get(small, {}).items():
                if value is None:
                    continue
                slot = _slot(small, value, shifted_state.get(name))
                if slot is not None:
                    slots[name] = slot
                elif name not in found.odd:
                    found.odd.append(name)


def _find_filled(found: Findings, at_rest: Optimizer) -> None:
    """Find the slots that begin with other values than zeros; ``at_rest`` took steps that leave them as they begin."""
    for number, group in enumerate(at_rest.param_groups):
        for small in group["params"]:
            slots, state = found.slots[number, kind_of(small)], at_rest.state.get(small, {})
            for name, slot in slots.items():
                value = state.get(name)
                if slot.shaped and isinstance(value, Tensor) and is_continuous(value.dtype):
                    filled = bool((computable(value).abs() > _NOTHING).any())
                    slots[name] = replace(slot, begins_filled=filled)


def _find_numbers(found: Findings, before: Numbers, after: Numbers, otherwise: Numbers) -> None:
    """Find the numbers outside of the state that steps change; ``otherwise``: after steps with other gradients."""
    changed: list[str] = []
    for old, new, other in zip(before, after, otherwise, strict=True):
        names = [name for name, value in new.items() if name not in old or not _same(old[name], value)]
        for name in names:
            if name not in changed and not _same(new[name], other.get(name)):
                found.estimates.append(name)
        changed += names
        # The optimizer's own numbers follow those of its groups.
        if new is after[-1]:
            found.attributes.extend(names)
        else:
            found.group.extend(names)
    found.group = list(dict.fromkeys(found.group))


def _slot(small: Tensor, value: Any, shifted: Any) -> Slot | None:
    """The slot of a value; None if it is neither a number nor a tensor in the shape of its parameter."""
    if is_number(value):
        return Slot(False, torch.float64, torch.device("cpu"), type(value))
    if not isinstance(value, Tensor) or (value.dim() and value.shape != small.shape):
        return None
    shaped = value.dim() > 0
    copies = False
    if shaped and isinstance(shifted, Tensor) and is_continuous(value.dtype):
        # The shifted trial had weights that are larger by 1000: a copy follows them, a momentum hardly changes.
        copies = bool(((computable(shifted) - computable(value)).abs() > 500).any())
    return Slot(shaped, value.dtype, value.device, copies_weights=copies)


def _same(one: Any, other: Any) -> bool:
    ones, others = list(_leaves(one)), list(_leaves(other))
    if len(ones) != len(others):
        return False
    return all(map(_equal, ones, others))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and (one is other or bool(one == other))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in items_of(value):
            yield from _leaves(item)
    else:
        yield value
