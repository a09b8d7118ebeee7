"""One optimizer and what it keeps: begins anew, goes into a file and comes back, exactly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.state.optimizer_probe import Findings, Slot

_ABSENT: Any = ...  # its copy is itself


class TrackedOptimizer:
    """An optimizer, and what it keeps.

    Args:
        optimizer: the user's, or one inside of it.
        findings: what a trial has shown of it.
    """

    def __init__(self, optimizer: Optimizer, findings: Findings) -> None:
        self.optimizer = optimizer
        self.findings = findings
        used = bool(optimizer.state)
        self._groups = [
            {name: copy.deepcopy(self._first(group, name, used)) for name in findings.group}
            for group in optimizer.param_groups
        ]
        self._attributes = {name: vars(optimizer).get(name, _ABSENT) for name in findings.attributes}

    def begin_anew(self) -> None:
        """Give groups and attributes the numbers that they had before the first step."""
        for group, first in zip(self.optimizer.param_groups, self._groups, strict=False):
            _put_back(group, first)
        _put_back(vars(self.optimizer), self._attributes)

    def groups(self) -> dict[int, int]:
        """The number of the group of each parameter, by its identity."""
        groups = self.optimizer.param_groups
        return {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}

    def slots(self, group: int, dim: int) -> dict[str, Slot]:
        """Of a parameter of this many dimensions; in a group that was added since, as in the others."""
        found = self.findings.slots
        others = [slots for (_, of_dim), slots in found.items() if of_dim == dim]
        return found.get((group, dim), others[0] if others else {})

    def check_shown(self, parameter: nn.Parameter, state: dict[str, Any], slots: dict[str, Slot]) -> None:
        """Check that the state of a present parameter is what the trial has shown of its kind.

        Raises:
            ValueError: if there is more of it, or it has another shape.
        """
        more = [name for name, value in state.items() if value is not None and name not in slots]
        odd = [
            n
            for n, slot in slots.items()
            if slot.shaped and getattr(state.get(n), "shape", parameter.shape) != parameter.shape
        ]
        if slots and (more or odd):
            raise ValueError(
                f"{type(self.optimizer).__name__} keeps {(more + odd)[0]!r} of a parameter of shape "
                f"{tuple(parameter.shape)}, as it did not of a small one in a trial step, so its state cannot be sent; "
                "use momentum='reset'."
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's ``state_dict``, of this optimizer alone."""
        index: dict[int, int] = {}
        groups = []
        for group in self.optimizer.param_groups:
            places = [index.setdefault(id(parameter), len(index)) for parameter in group["params"]]
            groups.append({**group, "params": places})
        state = {index.get(id(key), key): value for key, value in self.optimizer.state.items()}
        attributes = {name: getattr(self.optimizer, name) for name in self._attributes if hasattr(self.optimizer, name)}
        return {"state": state, "param_groups": groups, **({"attributes": attributes} if attributes else {})}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """In place, as groups may be another optimizer's too; and exactly, as torch's would cast wide state."""
        parameters: list[nn.Parameter] = []
        for group, values in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
            known = set(map(id, parameters))
            parameters += [parameter for parameter in group["params"] if id(parameter) not in known]
        groups = self.groups()
        self.optimizer.state.clear()
        for place, state in saved["state"].items():
            if not isinstance(place, int):
                self.optimizer.state[place] = state
                continue
            parameter = parameters[place]
            slots = self.slots(groups[id(parameter)], parameter.dim())
            self.optimizer.state[parameter] = {
                name: _to_device(
                    value, slots[name].device if name in slots and not slots[name].shaped else parameter.device
                )
                for name, value in state.items()
            }
        vars(self.optimizer).update(saved.get("attributes", {}))

    def _first(self, group: dict[str, Any], name: str, used: bool) -> Any:
        return self.optimizer.defaults.get(name, group.get(name, _ABSENT)) if used else group.get(name, _ABSENT)


class StateNumber:
    """A Python number in the state of a parameter, and the tensor that travels in its place.

    Args:
        optimizer: whose state.
        parameter: of which parameter.
        name: of the number.
        slot: what is known of it.
    """

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, name: str, slot: Slot) -> None:
        self.optimizer = optimizer
        self.parameter = parameter
        self.name = name
        self.tensor = torch.tensor(float(optimizer.state[parameter].get(name, 0)), dtype=slot.dtype)
        self._number = slot.number

    def value(self) -> Any:
        """What arrived, in its own class."""
        assert self._number is not None
        value = self.tensor.item()
        return self._number(value if self._number is float else round(value))


def _put_back(values: dict[str, Any], first: dict[str, Any]) -> None:
    for name, value in first.items():
        if value is _ABSENT:
            values.pop(name, None)
        else:
            values[name] = copy.deepcopy(value)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return [_to_device(item, device) for item in value] if isinstance(value, list) else value
