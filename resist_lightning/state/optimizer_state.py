"""Resets optimizer state, or lets it travel with the parameters that it belongs to.

State is addressed by parameter, never by position: an optimizer is built on the full model and keeps its groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.state.memory import CPU
from resist_lightning.state.optimizer_probe import Slot, probe
from resist_lightning.state.optimizer_twin import with_inner
from resist_lightning.state.tracked_optimizer import StateNumber, TrackedOptimizer

_PLAIN = (bool, int, float, str, tuple, type(None))  # print the same on all workers


class OptimizerStates:
    """The state of all optimizers of a worker, and of their inner optimizers.

    Args:
        optimizers: the user's optimizers, built on the full model.
        device: of the worker, where parameters that have no memory yet will live.

    Raises:
        ValueError: for an optimizer that cannot work with absent parameters (LBFGS, Adagrad), or that talks to other
            workers in its step.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device = CPU) -> None:
        self._given = list(optimizers)
        self._tracked: list[TrackedOptimizer] = []
        for optimizer in optimizers:
            for each, findings in zip(with_inner(optimizer), probe(optimizer, device), strict=True):
                self._tracked.append(TrackedOptimizer(each, findings))
        # Python numbers in transit, by optimizer, parameter and name.
        self._numbers: dict[tuple[int, int, str], StateNumber] = {}

    @property
    def optimizers(self) -> list[Optimizer]:
        """All optimizers, inner ones included."""
        return [tracked.optimizer for tracked in self._tracked]

    def rate(self) -> float:
        """The learning rate now: of the first group of the first optimizer; 0 if there is none."""
        return first_rate(self._given) or 0.0

    def mean_rate(self) -> float:
        """The learning rate now, as a mean over all parameter groups; 0 if there is none."""
        rates = []
        for optimizer in self._given:
            rates += [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        return sum(rates) / len(rates) if rates else 0.0

    def warn_about_settings(self, momentum: str | None, length: str) -> None:
        """Warn about state that ``momentum`` does not treat as a user may expect; ``length`` of rounds, in words."""
        for tracked in self._tracked:
            name, found = type(tracked.optimizer).__name__, tracked.findings
            if found.unknown:
                warnings.warn(
                    f"the state of {name} is not known: a trial step on a small parameter failed ({found.unknown}). "
                    "Its `state` restarts, or moves with its parameter; what it keeps elsewhere stays as it is.",
                    stacklevel=3,
                )
            elif found.estimates and momentum == "reset":
                warnings.warn(
                    f"{name} estimates {', '.join(found.estimates)} from the gradients, but momentum='reset' restarts "
                    f"them in every round of {length}: use 'keep', or longer rounds.",
                    stacklevel=3,
                )
            elif found.estimates:
                warnings.warn(
                    f"{name} estimates {', '.join(found.estimates)} from the gradients, and momentum={momentum!r} "
                    "keeps each worker's own: workers may train at different learning rates.",
                    stacklevel=3,
                )

    def check_travel(self, momentum: str = "travel", instead: str = "'keep' or 'reset'", *, cut: bool = False) -> None:
        """Check that the state can go with its block, or be cut with its neurons.

        Args:
            momentum: the policy that needs it.
            instead: policies that do not.
            cut: whether state begins with zeros where an entry comes without it.

        Raises:
            ValueError: for a slot that is neither a number nor has the shape of its parameter; if ``cut``, for one that
                is a copy of the weights, or begins with other values than zeros.
        """
        for tracked in self._tracked:
            name, found = type(tracked.optimizer).__name__, tracked.findings
            if found.unknown:
                raise ValueError(
                    f"momentum={momentum!r} cannot move the state of {name}, which is not known: a trial step on a "
                    f"small parameter failed ({found.unknown}); use momentum={instead}."
                )
            for odd in found.odd:
                raise ValueError(
                    f"momentum={momentum!r} cannot move {odd!r} of {name}, which has another shape than its parameter; "
                    f"use momentum={instead}."
                )
            unfit = next(found.not_from_zeros(), None)
            if cut and unfit is not None:
                key, reason = unfit
                raise ValueError(
                    f"momentum={momentum!r} gives zeros to entries that arrive without state, but {key!r} of {name} "
                    f"{reason}; use momentum={instead}."
                )

    def warn_of_counts(self, momentum: str) -> None:
        """Warn of counts that go on for a whole parameter while single entries of it arrive with zeros."""
        for tracked in self._tracked:
            counts: set[str] = set()
            for slots in tracked.findings.slots.values():
                if any(slot.shaped for slot in slots.values()):
                    counts.update(key for key, slot in slots.items() if not slot.shaped)
            if counts:
                warnings.warn(
                    f"{type(tracked.optimizer).__name__} counts the steps of a whole parameter "
                    f"({', '.join(sorted(counts))}). With momentum={momentum!r} entries that arrive without state get "
                    "zeros while that count goes on. If the optimizer corrects by the count, as Adam does, that "
                    "correction is left out for them: their steps are several times as long as the learning rate says. "
                    "Use momentum='reset' or an optimizer without a count, such as SGD.",
                    stacklevel=4,
                )

    def check_reset_by_parameter(self) -> None:
        """Check that the state of some parameters can restart without that of the others.

        Raises:
            ValueError: for an optimizer that keeps numbers for all of them.
        """
        for tracked in self._tracked:
            numbers = [*tracked.findings.group, *tracked.findings.attributes]
            if numbers:
                raise ValueError(
                    "momentum='reset' with fragments restarts the state of one fragment at a time, but "
                    f"{type(tracked.optimizer).__name__} keeps {', '.join(numbers)} for all parameters; use "
                    "momentum='keep', or fragments=1."
                )

    def reset(self) -> None:
        """Forget all state: every optimizer restarts as if it were new, but for its schedule."""
        for tracked in self._tracked:
            tracked.optimizer.state.clear()
            tracked.reset_numbers()

    def reset_stateless(self) -> None:
        """For optimizers without state, reset the numbers in groups and attributes that belonged to it."""
        for tracked in self._tracked:
            if not tracked.optimizer.state:
                tracked.reset_numbers()

    def forget_odd(self) -> None:
        """Forget the state of optimizers with slots that can neither be cut nor tracked whole."""
        for tracked in self._tracked:
            if tracked.findings.odd or tracked.findings.unknown:
                tracked.optimizer.state.clear()

    def drop(self, parameters: Collection[nn.Parameter]) -> None:
        """Forget the state of some parameters."""
        for tracked in self._tracked:
            for parameter in parameters:
                tracked.optimizer.state.pop(parameter, None)

    def state_dict(self) -> list[dict[str, Any]]:
        """State and parameter groups of each optimizer; groups too, as schedules may differ between workers."""
        return [tracked.state_dict() for tracked in self._tracked]

    def check_fits(self, states: Sequence[dict[str, Any]]) -> None:
        """Check that a :meth:`state_dict` fits the optimizers, of which some may be of another class.

        Raises:
            CheckpointError: if it does not.
        """
        for tracked, state in zip(self._tracked, states, strict=False):
            tracked.check_fits(state)

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Load a :meth:`state_dict`, bit for bit; by position, where there are more or fewer optimizers than in it."""
        if len(states) != len(self._tracked):
            warnings.warn(
                f"the checkpoint has the state of {len(states)} optimizer(s), and there are {len(self._tracked)} here. "
                "It is loaded by position; an optimizer that is new starts without state.",
                stacklevel=2,
            )
        for tracked, state in zip(self._tracked, states, strict=False):
            tracked.load_state_dict(state)

    def known(self, parameter: nn.Parameter) -> bool:
        """Whether some optimizer has state for a parameter."""
        return any(optimizer.state.get(parameter) for optimizer in self.optimizers)

    def tensors(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The state of some parameters, in a fixed order; missing tensors are created: zeros, or copies of the weights.

        A Python number is represented by a tensor until :meth:`take_numbers`; the state of an absent parameter by
        tensors on the meta device, for their shape and data type.

        Raises:
            ValueError: if there is more state than a trial step had shown.
        """
        found: list[Tensor] = []
        for parameter, tracked, slots in self._slots_of(parameters):
            # Only shapes and data types are needed for an absent parameter: its state has been dropped.
            if parameter.is_meta:
                found += [slot.empty(parameter, torch.device("meta")) for slot in slots.values()]
                continue
            state = tracked.optimizer.state[parameter]
            tracked.check_shown(parameter, state, slots)
            for name, slot in slots.items():
                if slot.number is not None:  # only tensors can be sent
                    found.append(self._number(tracked.optimizer, parameter, name, slot))
                    continue
                if state.get(name) is None:  # not stepped yet; its next holder expects it all the same
                    state[name] = slot.first(parameter)
                found.append(state[name])
        return found

    def take_numbers(self) -> None:
        """After a hand-over, write back the Python numbers that :meth:`tensors` represented."""
        for number in self._numbers.values():
            number.optimizer.state[number.parameter][number.name] = number.value()
        self._numbers = {}

    def slots(self, parameters: Iterable[nn.Parameter]) -> list[Slot]:
        """Each slot that has the shape of its parameter."""
        found: list[Slot] = []
        for _, _, slots in self._slots_of(parameters):
            found += [slot for slot in slots.values() if slot.shaped]
        return found

    def bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the state of some parameters, present or not; makes none."""
        total = 0
        for parameter, _, slots in self._slots_of(parameters):
            total += sum(slot.bytes(parameter) for slot in slots.values())
        return total

    def describe(self) -> dict[str, str]:
        """Class, hyper-parameters and size of every parameter group, by name."""
        found: dict[str, str] = {}
        for number, optimizer in enumerate(self._given):
            found[f"optimizer {number}"] = type(optimizer).__name__
            for index, group in enumerate(optimizer.param_groups):
                where = f"of optimizer {number}, group {index}"
                found[f"parameters {where}"] = str(len(group["params"]))
                for key, value in group.items():
                    plain = _plain(value)
                    if isinstance(plain, _PLAIN):
                        found[f"{key} {where}"] = str(plain)
        return found

    def _number(self, optimizer: Optimizer, parameter: nn.Parameter, name: str, slot: Slot) -> Tensor:
        key = id(optimizer), id(parameter), name
        if key not in self._numbers:
            self._numbers[key] = StateNumber(optimizer, parameter, name, slot)
        return self._numbers[key].tensor

    def _slots_of(
        self, parameters: Iterable[nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, TrackedOptimizer, dict[str, Slot]]]:
        """For each parameter that trains, the optimizers that have state for it, and the slots of this state."""
        # An optimizer around another one may show that one's state as its own: each state counts once.
        owners: dict[int, TrackedOptimizer] = {}
        for tracked in self._tracked:
            owners.setdefault(id(tracked.optimizer.state), tracked)
        groups = [(tracked, tracked.groups()) for tracked in owners.values()]
        for parameter in parameters:
            for tracked, group_of in groups:
                if parameter.requires_grad and id(parameter) in group_of:
                    group = group_of[id(parameter)]
                    yield parameter, tracked, tracked.slots(group, parameter)


def ids_of_parameters(optimizers: Iterable[Optimizer]) -> set[int]:
    """Ids of the parameters that some optimizers have."""
    found: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found.update(map(id, group["params"]))
    return found


def first_rate(optimizers: Sequence[Optimizer]) -> float | None:
    """The learning rate now: of the first group of the first optimizer; None if there is none."""
    groups = optimizers[0].param_groups if optimizers else []
    return float(groups[0]["lr"]) if groups and "lr" in groups[0] else None


def _plain(value: object) -> object:
    """The number in a tensor of one number, as a learning rate may be; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
