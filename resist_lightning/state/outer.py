"""The outer optimizer: SGD with Nesterov momentum on the change of a round (DiLoCo, arXiv 2311.08105)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from resist_lightning.comm.tensors import is_continuous, wide_dtype


class OuterState(TypedDict):
    """An outer optimizer in a checkpoint, by name: parameters that step next, their start values, velocities."""

    steps: list[str]
    start: dict[str, Tensor]
    velocity: dict[str, Tensor]


def outer_dtype(tensor: Tensor) -> torch.dtype:
    """The data type of an outer step: the parameter's own, but 32 bits where it has fewer."""
    return wide_dtype(tensor.dtype)


def outer_bytes(tensor: Tensor) -> int:
    """Bytes of the velocity of a parameter, present or not."""
    return tensor.numel() * outer_dtype(tensor).itemsize


def has_outer_step(tensor: Tensor) -> bool:
    """Whether this tensor takes outer steps: a parameter that trains. Buffers and frozen ones just become the mean."""
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad and is_continuous(tensor.dtype)


class OuterOptimizer:
    """Takes an outer step with parameters that a sync has replaced by their mean.

    ::

        change    = parameter when the round began - mean when it ends
        velocity  = momentum * velocity + change
        parameter = mean - ((rate - 1) * change + rate * momentum * velocity)

    The last line is SGD's step from the start of the round, written so that with rate 1 and without momentum it is the
    mean, bit for bit. Workers with equal values compute equal ones, so nothing needs to be sent.

    Args:
        rate: learning rate, above 0.
        momentum: in [0, 1).
    """

    def __init__(self, rate: float, momentum: float) -> None:
        self._rate = rate
        self._momentum = momentum
        # By identity of the parameter, which is the same object in all rounds, present or absent.
        self._start: dict[int, Tensor] = {}
        self._velocity: dict[int, Tensor] = {}

    def forget_start(self, kept: Collection[int] = ()) -> None:
        """Free the copies of :meth:`begin_round`, except for these tensors, by identity."""
        self._start = {key: start for key, start in self._start.items() if key in kept}

    def begin_round(self, tensors: Iterable[Tensor], copies: Mapping[int, Tensor], kept: Collection[int] = ()) -> None:
        """Note the values of tensors when a round begins, for their next step; forget the velocity of all others.

        Args:
            tensors: all tensors with which this worker will take a step at the next sync that covers them.
            copies: by identity, copies of tensors that are kept elsewhere in this round: they need no second one.
            kept: by identity, tensors that the last sync did not cover: their start and velocity stay.
        """
        self.forget_start(kept)
        start = self._start
        velocity = {key: value for key, value in self._velocity.items() if key in kept}
        for tensor in filter(has_outer_step, tensors):
            key = id(tensor)
            start[key] = copies[key] if key in copies else tensor.detach().clone()
            if key in self._velocity:
                velocity[key] = self._velocity[key]
        self._start, self._velocity = start, velocity

    def stepping(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that take the next :meth:`step`: those that trained when the round began, frozen since or not."""
        return [tensor for tensor in tensors if id(tensor) in self._start]

    def step(self, tensors: Iterable[Tensor], means: Iterable[Tensor] | None = None) -> None:
        """Take a step with the tensors that :meth:`begin_round` noted. Sends nothing.

        Args:
            tensors: tensors of the module.
            means: their means, which take the step; None where the tensors are their means now.
        """
        tensors = list(tensors)
        for tensor, mean in zip(tensors, tensors if means is None else means, strict=True):
            start = self._start.pop(id(tensor), None)
            if start is not None:
                self._step(mean.detach(), start, self.velocity(tensor))

    def receive_velocity(self, tensor: Tensor, velocity: Tensor) -> None:
        """Keep a velocity that has arrived before its parameter."""
        self._velocity[id(tensor)] = velocity

    def _step(self, mean: Tensor, start: Tensor, velocity: Tensor) -> None:
        wide = mean.to(velocity.dtype)
        change = start.to(velocity.dtype) - wide
        velocity.mul_(self._momentum).add_(change)
        # One operation after the other: fused ones round otherwise on other devices, and replicas would differ.
        beyond = change.mul_(self._rate - 1)
        beyond.add_(velocity * (self._rate * self._momentum))
        mean.copy_(wide - beyond)

    def velocity(self, tensor: Tensor) -> Tensor:
        """The velocity of a parameter, zeros at first; that of an absent one is on the meta device, for its shape."""
        if tensor.is_meta:
            return torch.empty(tensor.shape, dtype=outer_dtype(tensor), device="meta")
        if id(tensor) not in self._velocity:
            self._velocity[id(tensor)] = torch.zeros_like(tensor.detach(), dtype=outer_dtype(tensor))
        return self._velocity[id(tensor)]

    def velocities(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The :meth:`velocity` of each tensor that takes outer steps."""
        return [self.velocity(tensor) for tensor in tensors if has_outer_step(tensor)]

    def state_dict(self, tensors: Mapping[str, Tensor], elsewhere: Collection[str], *, in_training: bool) -> OuterState:
        """State for :meth:`load_state_dict`, on the CPU.

        Args:
            tensors: tensors of the module, by name.
            elsewhere: names of the tensors whose values at the beginning of the round are saved elsewhere.
            in_training: whether the tensors have their values in training now.
        """
        state: OuterState = {"steps": [], "start": {}, "velocity": {}}
        for name, tensor in tensors.items():
            if id(tensor) in self._velocity:
                state["velocity"][name] = self._velocity[id(tensor)].cpu()
            start = self._start.get(id(tensor))
            if start is None:
                continue
            state["steps"].append(name)
            # At the start of a round the parameter still has this value: no need to save it twice.
            saved_already = in_training and torch.equal(start, tensor)
            if name not in elsewhere and not saved_already:
                state["start"][name] = start.cpu()
        return state

    def load_state_dict(
        self, state: OuterState, tensors: Mapping[str, Tensor], copies: Mapping[int, Tensor], device: torch.device
    ) -> None:
        """Resume in the middle of a round, after :meth:`begin_round`.

        Args:
            state: from :meth:`state_dict`.
            tensors: tensors of the module, by name, with their values in training.
            copies: as for :meth:`begin_round`.
            device: device of the velocities.
        """
        self._start = {}
        for name in state["steps"]:
            tensor = tensors[name]
            if name in state["start"]:
                self._start[id(tensor)] = state["start"][name].to(tensor.device, copy=True)
            else:
                self._start[id(tensor)] = copies[id(tensor)] if id(tensor) in copies else tensor.detach().clone()
        for name, velocity in state["velocity"].items():
            self.receive_velocity(tensors[name], velocity.to(device, copy=True))
