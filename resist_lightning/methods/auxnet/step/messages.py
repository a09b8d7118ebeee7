"""What neighbouring stages tell each other in a step: posted early, waited for late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Finish


class Tag(IntEnum):
    """What a message is."""

    TARGET = 1
    """λ + u, to the worker before."""
    TRUTH = 2
    """Y, to the worker behind."""
    GRADIENT = 3
    """In steps that wait for each other: the gradient of the loss, to the worker before."""
    OUTPUT = 4
    """Of the network, from the last worker to all others."""


@dataclass(frozen=True)
class Shapes:
    """Shapes without the batch, and the data type of all messages.

    Args:
        input: of the network's input.
        boundaries: of what crosses each boundary, from the first.
        output: of the network's output.
        dtype: of all of them.
    """

    input: tuple[int, ...]
    boundaries: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    dtype: torch.dtype

    def boundary_bytes(self, batch: int) -> int:
        """By closed form, what all workers send over all boundaries in a step: twice what crosses."""
        return sum(2 * batch * math.prod(shape) * self.dtype.itemsize for shape in self.boundaries)

    def sent_bytes(self, batch: int, worker: int) -> dict[str, int]:
        """By closed form, what one worker sends in a step, by kind."""
        ends = self.boundaries[max(worker - 1, 0) : worker + 1]  # of the first and the last worker one, else two
        boundary = sum(batch * math.prod(shape) * self.dtype.itemsize for shape in ends)
        last = worker == len(self.boundaries)
        output = batch * math.prod(self.output) * self.dtype.itemsize * len(self.boundaries) if last else 0
        return {"boundary": boundary, "output": output}


class Expected:
    """A message that was asked for and may not be here yet."""

    def __init__(self, tensor: Tensor, finish: Finish) -> None:
        self._tensor = tensor
        self._finish: Finish | None = finish

    def take(self) -> Tensor:
        """Wait for it."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._tensor


class Messages:
    """One worker's messages; see :class:`Tag`.

    Args:
        collective: the workers.
        shapes: of all messages.
        device: where they are put.
    """

    def __init__(self, collective: Collective, shapes: Shapes, device: torch.device) -> None:
        self._collective = collective
        self._shapes = shapes
        self._device = device
        self._under_way: list[Finish] = []

    def expect_truth(self, batch: int) -> Expected:
        """From the worker before: what this stage is really given."""
        return self._expect(Tag.TRUTH, self._collective.worker - 1, batch, self._before)

    def expect_target(self, batch: int) -> Expected:
        """From the worker behind: what it guesses, and wants."""
        return self._expect(Tag.TARGET, self._collective.worker + 1, batch, self._behind)

    def expect_gradient(self, batch: int) -> Expected:
        """From the worker behind: the gradient of the loss at this stage's output."""
        return self._expect(Tag.GRADIENT, self._collective.worker + 1, batch, self._behind)

    def expect_output(self, batch: int) -> Expected:
        """From the last worker: the network's output."""
        return self._expect(Tag.OUTPUT, self._collective.workers - 1, batch, self._shapes.output)

    def send_target(self, target: Tensor) -> None:
        """To the worker before."""
        self._send(Tag.TARGET, self._collective.worker - 1, target, "boundary")

    def send_truth(self, made: Tensor) -> None:
        """To the worker behind."""
        self._send(Tag.TRUTH, self._collective.worker + 1, made, "boundary")

    def send_gradient(self, gradient: Tensor) -> None:
        """To the worker before."""
        self._send(Tag.GRADIENT, self._collective.worker - 1, gradient, "boundary")

    def send_output(self, output: Tensor) -> None:
        """To all other workers; call it on the last one."""
        for worker in range(self._collective.workers - 1):
            self._send(Tag.OUTPUT, worker, output, "output")

    def settle(self) -> None:
        """Wait until all that was sent has left."""
        for finish in self._under_way:
            finish()
        self._under_way = []

    @property
    def _before(self) -> Sequence[int]:
        return self._shapes.boundaries[self._collective.worker - 1]

    @property
    def _behind(self) -> Sequence[int]:
        return self._shapes.boundaries[self._collective.worker]

    def _expect(self, tag: Tag, source: int, batch: int, shape: Sequence[int]) -> Expected:
        room = torch.empty((batch, *shape), dtype=self._shapes.dtype, device=self._device)
        return Expected(room, self._collective.start_receive(room, source, tag))

    def _send(self, tag: Tag, target: int, tensor: Tensor, kind: str) -> None:
        message = tensor.detach().to(self._shapes.dtype)
        self._under_way.append(self._collective.start_send(message, target, tag, kind))
