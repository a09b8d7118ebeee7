"""What becomes of optimizer state when blocks change hands.

Addressed by parameter, never by position: an optimizer is built on the full model and keeps its parameter groups.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PLAIN = (bool, int, float, str, tuple, type(None))  # what prints alike on all workers
_STATEFUL_AT_ONCE = "makes its state when it is built, before a worker knows its blocks; choose another optimizer"


class OptimizerStates:
    """The state of all optimizers of a worker.

    Args:
        optimizers: the user's optimizers, built on the full model.

    Raises:
        ValueError: for an optimizer that cannot work with absent parameters (LBFGS, Adagrad).
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._slots = [[_probe(optimizer, group) for group in optimizer.param_groups] for optimizer in optimizers]

    def rate(self) -> float:
        """The learning rate now: of the first group of the first optimizer; 0 if there is none."""
        return float(self._optimizers[0].param_groups[0]["lr"]) if self._optimizers else 0.0

    def check_travel(self, momentum: str = "travel", instead: str = "'keep' or 'reset'") -> None:
        """Check that the state can go with its block, or be cut with its neurons.

        Args:
            momentum: the policy that needs it.
            instead: policies that do not.

        Raises:
            ValueError: for a slot that is neither a number nor has the shape of its parameter.
        """
        for optimizer, groups in zip(self._optimizers, self._slots, strict=True):
            for name in _odd(groups):
                raise ValueError(
                    f"momentum={momentum!r} cannot move {name!r} of {type(optimizer).__name__}, which has another "
                    f"shape than its parameter; use momentum={instead}."
                )

    def reset(self) -> None:
        """Forget all state: every optimizer starts again."""
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def forget_odd(self) -> None:
        """Forget the state of optimizers with slots that are neither numbers nor shaped like their parameters."""
        for optimizer, groups in zip(self._optimizers, self._slots, strict=True):
            if _odd(groups):
                optimizer.state.clear()

    def drop(self, parameters: Collection[nn.Parameter]) -> None:
        """Forget the state of some parameters."""
        for optimizer in self._optimizers:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)

    def own(self) -> list[dict[str, Any]]:
        """What each optimizer of this worker has, settings of the parameter groups too: a schedule may part them."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_own(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over what :meth:`own` gave."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def known(self, parameter: nn.Parameter) -> bool:
        """Whether some optimizer has state of a parameter."""
        return any(optimizer.state.get(parameter) for optimizer in self._optimizers)

    def tensors(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The state tensors of some parameters, in a fixed order; missing ones are made, filled with zeros.

        For an absent parameter: tensors on the meta device, which only tell shape and data type.
        """
        found: list[Tensor] = []
        for parameter, optimizer, slots in self._slots_of(parameters):
            state = {} if parameter.is_meta else optimizer.state[parameter]
            for name, example in slots.items():
                if state.get(name) is None:
                    state[name] = _empty_slot(parameter, example)
                found.append(state[name])
        return found

    def slots(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """An example of each slot that has the shape of its parameter; makes none."""
        return [example for _, _, slots in self._slots_of(parameters) for example in slots.values() if example.dim()]

    def bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the state of some parameters, present or not; makes none."""
        return sum(
            (parameter.numel() if example.dim() else 1) * example.element_size()
            for parameter, _, slots in self._slots_of(parameters)
            for example in slots.values()
        )

    def describe(self) -> dict[str, str]:
        """Class, hyper-parameters and size of every parameter group, by name."""
        found: dict[str, str] = {}
        for number, optimizer in enumerate(self._optimizers):
            found[f"optimizer {number}"] = type(optimizer).__name__
            for index, group in enumerate(optimizer.param_groups):
                values = {"parameters": len(group["params"]), **{key: _plain(group[key]) for key in group}}
                where = f"of optimizer {number}, group {index}"
                found |= {f"{key} {where}": str(v) for key, v in values.items() if isinstance(v, _PLAIN)}
        return found

    def _slots_of(
        self, parameters: Iterable[nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Optimizer, dict[str, Tensor]]]:
        for parameter in parameters:
            for optimizer, groups in zip(self._optimizers, self._slots, strict=True):
                for group, slots in zip(optimizer.param_groups, groups, strict=False):
                    if parameter.requires_grad and any(parameter is member for member in group["params"]):
                        yield parameter, optimizer, slots


def _odd(groups: Iterable[dict[str, Tensor]]) -> list[str]:
    """Names of the slots of another shape than the probe's parameter."""
    return [name for slots in groups for name, slot in slots.items() if slot.dim() and slot.shape != (2, 3)]


def _plain(value: object) -> object:
    """A learning rate may be a tensor."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _empty_slot(parameter: nn.Parameter, example: Tensor) -> Tensor:
    if example.dim() == 0:
        return torch.zeros_like(example, device="meta" if parameter.is_meta else None)
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()


def _probe(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that an optimizer keeps for a parameter of a group, found by letting a twin of it take one step."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{name} flattens all parameters into one vector, and a worker does not have them all.")
    first = next(iter(group["params"]), torch.zeros(()))
    dummy = nn.Parameter(torch.zeros(2, 3, dtype=first.dtype, device=first.device))
    dummy.grad = torch.zeros_like(dummy)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [dummy]}]
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    try:
        type(twin).step(twin)  # not twin.step: a scheduler replaces that by one bound to the original
    except KeyError as error:
        raise ValueError(
            f"{name} makes its state when it is built and cannot restart without it (missing: {error}); choose an "
            "optimizer that makes its state in the first step, such as SGD or AdamW."
        ) from error
    return {key: value for key, value in twin.state[dummy].items() if isinstance(value, Tensor)}
