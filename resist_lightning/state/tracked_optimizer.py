"""An optimizer with all its state, which can be reset, saved and loaded exactly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from resist_lightning.state.host_copies import copied
from resist_lightning.state.optimizer_match import CLASS, check_fits, check_groups
from resist_lightning.state.optimizer_probe import Findings, Slot
from resist_lightning.state.optimizer_twin import kind_of
from resist_lightning.state.python_numbers import python_numbers

_ABSENT: Any = ...  # survives deepcopy as the same object


class TrackedOptimizer:
    """An optimizer, with the state that it keeps outside of ``state`` too."""

    def __init__(self, optimizer: Optimizer, findings: Findings) -> None:
        self.optimizer = optimizer
        self.findings = findings
        # The numbers that steps change, as before the first step.
        self._first_groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            first = {name: self._first(group, name) for name in findings.group}
            self._first_groups.append(copy.deepcopy(first))
        self._first_attributes = {name: vars(optimizer).get(name, _ABSENT) for name in findings.attributes}

    def reset_numbers(self) -> None:
        """Reset groups and attributes to the numbers that they had before the first step."""
        for number, group in enumerate(self.optimizer.param_groups):
            added = number >= len(self._first_groups)
            _put_back(group, self._first_of_added() if added else self._first_groups[number])
        _put_back(vars(self.optimizer), self._first_attributes)

    def _first_of_added(self) -> dict[str, Any]:
        """The numbers before the first step of a group that was added since: defaults, or those of the first group."""
        others = self._first_groups[0] if self._first_groups else {}
        defaults = self.optimizer.defaults
        return {name: defaults.get(name, others.get(name, _ABSENT)) for name in self.findings.group}

    def groups(self) -> dict[int, int]:
        """The group number of each parameter, by the parameter's identity."""
        found: dict[int, int] = {}
        for number, group in enumerate(self.optimizer.param_groups):
            found.update(dict.fromkeys(map(id, group["params"]), number))
        return found

    def slots(self, group: int, parameter: Tensor) -> dict[str, Slot]:
        """The slots of a parameter in a group."""
        found, kind = self.findings.slots, kind_of(parameter)
        if (group, kind) in found:
            return found[group, kind]
        # The group was added since: its parameters are taken to have the slots of others of their kind, or else those
        # that all others of their data type have.
        alike = [slots for (_, other), slots in found.items() if other == kind]
        if alike:
            return alike[0]
        kinds = [slots for (_, (_, dtype)), slots in found.items() if dtype == parameter.dtype]
        return kinds[0] if kinds and all(slots == kinds[0] for slots in kinds) else {}

    def check_shown(self, parameter: nn.Parameter, state: dict[str, Any], slots: dict[str, Slot]) -> None:
        """Check that the state of a present parameter matches the findings of a trial step.

        Raises:
            ValueError: if there is more of it, or it has another shape.
        """
        more = [name for name, value in state.items() if value is not None and name not in slots]
        odd: list[str] = []
        for name, slot in slots.items():
            # State without a shape is missing, as before the first step, or None.
            shape = getattr(state.get(name), "shape", parameter.shape)
            if slot.shaped and shape != parameter.shape:
                odd.append(name)
        if more or odd:
            raise ValueError(
                f"{type(self.optimizer).__name__} keeps {(more + odd)[0]!r} of a parameter of shape "
                f"{tuple(parameter.shape)}, as it did not of a small one in a trial step, so its state cannot be sent; "
                "use momentum='reset'."
            )

    def state_dict(self) -> dict[str, Any]:
        """Like torch's ``state_dict``, but of this optimizer alone: others around it may show the same state.

        A learning rate from NumPy becomes a Python number, as do all its scalars.
        """
        index: dict[int, int] = {}
        groups = []
        for group in self.optimizer.param_groups:
            # By position, as a file has no object identities; a parameter in two groups has one.
            places = [index.setdefault(id(parameter), len(index)) for parameter in group["params"]]
            groups.append({**group, "params": places})
        # State of the whole optimizer stands under a name.
        state = {index.get(id(key), key): value for key, value in self.optimizer.state.items()}
        saved: dict[str, Any] = {"state": state, "param_groups": groups, CLASS: type(self.optimizer).__name__}
        attributes = {}
        for name in self._first_attributes:
            if hasattr(self.optimizer, name):
                attributes[name] = getattr(self.optimizer, name)
        if attributes:
            saved["attributes"] = attributes
        return python_numbers(saved)  # type: ignore[no-any-return]

    def check_fits(self, saved: dict[str, Any]) -> None:
        """Check that a :meth:`state_dict`, which may be of another class, fits this optimizer.

        Raises:
            CheckpointError: if it does not.
        """
        check_groups(self.optimizer, saved)
        parameters, groups = self._parameters(), self.groups()
        missing: set[str] = set()
        for place, state in saved["state"].items():
            if not isinstance(place, int):
                continue
            parameter = parameters[place]
            slots = self.slots(groups[id(parameter)], parameter)
            # Less state alone is of other settings of the same class, such as `amsgrad`; torch then takes the saved.
            if state.keys() - slots.keys():
                missing |= slots.keys() - state.keys()
        check_fits(self.optimizer, saved, missing)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load copies of :meth:`state_dict` in place, without the casts of torch's ``load_state_dict``."""
        # In place because the groups may belong to another optimizer too.
        for group, values in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update(copied({name: value for name, value in values.items() if name != "params"}))
        parameters, groups = self._parameters(), self.groups()
        self.optimizer.state.clear()
        for place, state in saved["state"].items():
            if not isinstance(place, int):  # state of the whole optimizer, under a name
                self.optimizer.state[place] = copied(state)
                continue
            parameter = parameters[place]
            slots = self.slots(groups[id(parameter)], parameter)
            loaded = self.optimizer.state[parameter] = {}
            for name, value in state.items():
                # Step counters stay on the CPU in most optimizers, wherever the parameter is.
                counter = name in slots and not slots[name].shaped
                loaded[name] = _copied_to(slots[name].device if counter else parameter.device, value)
        vars(self.optimizer).update(copied(saved.get("attributes", {})))
        if saved.get(CLASS, type(self.optimizer).__name__) != type(self.optimizer).__name__:
            # As torch's: a class may correct what it was given, as AdamW does the weight decay of Adam's groups.
            self.optimizer.__setstate__({"state": self.optimizer.state, "param_groups": self.optimizer.param_groups})

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters in the order of their places in :meth:`state_dict`."""
        found: dict[int, nn.Parameter] = {}
        for group in self.optimizer.param_groups:
            found.update((id(parameter), parameter) for parameter in group["params"])
        return list(found.values())

    def _first(self, group: dict[str, Any], name: str) -> Any:
        """A group's number before the first step; of an optimizer that has stepped, its default."""
        now = group.get(name, _ABSENT)
        if not self.optimizer.state:
            return now
        return self.optimizer.defaults.get(name, now)


class StateNumber:
    """A Python number in a parameter's optimizer state, and the tensor that travels in its place."""

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, name: str, slot: Slot) -> None:
        self.optimizer = optimizer
        self.parameter = parameter
        self.name = name
        number = optimizer.state[parameter].get(name, 0)
        self.tensor = torch.tensor(float(number), dtype=slot.dtype)
        self._number = slot.number

    def value(self) -> Any:
        """The number that arrived, in its own type."""
        assert self._number is not None
        value = self.tensor.item()
        return self._number(value if self._number is float else round(value))


def _put_back(values: dict[str, Any], first: dict[str, Any]) -> None:
    for name, value in first.items():
        if value is _ABSENT:
            values.pop(name, None)
        else:
            values[name] = copy.deepcopy(value)


def _copied_to(device: torch.device, value: Any) -> Any:
    """``value`` with copies of all tensors in it, on a device."""
    return tree_map(lambda each: each.to(device, copy=True) if isinstance(each, Tensor) else each, value)
