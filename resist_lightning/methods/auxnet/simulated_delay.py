"""The reference for late gradients: plain back-propagation through the whole network, whose gradients wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class LateGradients:
    """Back-propagation whose gradient stage k of K applies ``delay * (K - 1 - k)`` steps late.

    It is taken at weights that are extrapolated by that many times the last step. In the warm-up no gradient is late.

    Args:
        stages: stages of the network, from the first.
        delay: steps by which a gradient is late for each stage that it passes.
        warmup_steps: number of first steps without a delay.
    """

    def __init__(self, stages: Sequence[nn.Module], delay: int, warmup_steps: int) -> None:
        self._stages = list(stages)
        self._warmup_steps = warmup_steps
        self._steps = 0
        self._steps_late = [delay * (len(self._stages) - 1 - k) for k in range(len(self._stages))]
        self._waiting: list[deque[list[Tensor | None]]] = [deque() for _ in self._stages]
        self._last: list[list[Tensor]] = []  # each stage's weights before the last step

    def step(self, x: Tensor, loss_of_output: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of a batch; afterwards, parameters have the gradients that are due."""
        steps_late = self._steps_late
        if self._steps < self._warmup_steps:
            steps_late = [0] * len(self._stages)
        self._steps += 1
        weights = [[p.detach().clone() for p in stage.parameters()] for stage in self._stages]
        with torch.no_grad():
            for stage, now, last, late in zip(self._stages, weights, self._last or weights, steps_late, strict=True):
                for parameter, value, before in zip(stage.parameters(), now, last, strict=True):
                    if parameter.requires_grad:
                        parameter.copy_(value + late * (value - before))
        made = x
        for stage in self._stages:
            made = stage(made)
        loss = loss_of_output(made)
        loss.backward()
        with torch.no_grad():
            for stage, now in zip(self._stages, weights, strict=True):
                for parameter, value in zip(stage.parameters(), now, strict=True):
                    parameter.copy_(value)
        self._last = weights
        for stage, waiting, late in zip(self._stages, self._waiting, steps_late, strict=True):
            waiting.append([parameter.grad for parameter in stage.parameters()])
            due = waiting.popleft() if len(waiting) > late else [None] * len(waiting[0])
            for parameter, gradient in zip(stage.parameters(), due, strict=True):
                parameter.grad = gradient
        return loss
