"""Point-to-point messages between stages in a step: receives are posted early and waited for late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.methods.auxnet.network.aux_defaults import NetworkInput


class Tag(IntEnum):
    """The content of a message."""

    # Several may be in transit between two workers; a receive takes the one with its tag.
    TARGET = 1
    """λ + u, to the worker before."""
    TRUTH = 2
    """Y, to the worker behind."""
    GRADIENT = 3
    """The gradient of the loss, to the worker before; in serial steps and with delayed gradients."""
    OUTPUT = 4
    """The network's output, from the last worker to all others."""


@dataclass(frozen=True)
class Shapes:
    """The network's input, and the shapes, without the batch, and the data type of all messages.

    Args:
        input: input of the network.
        boundaries: shape of the tensor that crosses each boundary, from the first.
        output: shape of the network's output.
        dtype: data type of all messages.
    """

    input: NetworkInput
    boundaries: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    dtype: torch.dtype

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError unless a batch has the shape that the network was cut for, and needs no gradient."""
        given, expected = tuple(x.shape[1:]), self.input.shape
        if given != expected:
            raise ValueError(
                f"the network is given {given} but was cut for inputs of {expected}: tensors at the boundaries would "
                "have another shape. Bring inputs to one size before training_step (in the data set, or in "
                "on_after_batch_transfer), and name with `input` the part of a batch that the network takes."
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the network's input requires a gradient, so something before the network is trained, and the gradient "
                "of a guess would not reach it. Make it a part of the network, or detach the input."
            )


class Expected:
    """A message whose receive was posted, and which may not have arrived yet."""

    def __init__(self, tensor: Tensor, finish: Finish) -> None:
        self._tensor = tensor
        self._finish: Finish | None = finish

    def take(self) -> Tensor:
        """Wait for the message, and return it."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._tensor


class Messages:
    """The messages of one worker; see :class:`Tag`."""

    def __init__(self, collective: Collective, shapes: Shapes, device: torch.device) -> None:
        self._collective = collective
        self._shapes = shapes
        self._device = device
        self._under_way: list[Finish] = []

    def expect_truth(self, batch: int) -> Expected:
        """Expect, from the worker before, its stage's output."""
        worker = self._collective.worker
        return self._expect(Tag.TRUTH, worker - 1, batch, self._shapes.boundaries[worker - 1])

    def expect_target(self, batch: int) -> Expected:
        """Expect, from the worker behind, its target for this stage's output."""
        return self._expect_from_next(Tag.TARGET, batch)

    def expect_gradient(self, batch: int) -> Expected:
        """Expect, from the worker behind, the gradient of the loss at this stage's output."""
        return self._expect_from_next(Tag.GRADIENT, batch)

    def expect_output(self, batch: int) -> Expected:
        """Expect, from the last worker, the network's output."""
        return self._expect(Tag.OUTPUT, self._collective.workers - 1, batch, self._shapes.output)

    def send_target(self, target: Tensor) -> None:
        """Send to the worker before."""
        self._send(Tag.TARGET, self._collective.worker - 1, target, "boundary")

    def send_truth(self, made: Tensor) -> None:
        """Send to the worker behind."""
        self._send(Tag.TRUTH, self._collective.worker + 1, made, "boundary")

    def send_gradient(self, gradient: Tensor) -> None:
        """Send to the worker before."""
        self._send(Tag.GRADIENT, self._collective.worker - 1, gradient, "boundary")

    def send_output(self, output: Tensor) -> None:
        """Send to all other workers; call it on the last one."""
        # Not a broadcast: the others post their receives early, and take the output when they need it.
        # From host memory, from which gloo sends: else it would be copied there for each message.
        on_host = output.detach().to(self._shapes.dtype).cpu()
        for worker in range(self._collective.workers - 1):
            self._send(Tag.OUTPUT, worker, on_host, "output")

    def settle(self) -> None:
        """Wait until all sends have completed."""
        for finish in self._under_way:
            finish()
        self._under_way = []

    def _expect_from_next(self, tag: Tag, batch: int) -> Expected:
        worker = self._collective.worker
        return self._expect(tag, worker + 1, batch, self._shapes.boundaries[worker])

    def _expect(self, tag: Tag, source: int, batch: int, shape: Sequence[int]) -> Expected:
        buffer = torch.empty((batch, *shape), dtype=self._shapes.dtype, device=self._device)
        return Expected(buffer, self._collective.start_receive(buffer, source, tag))

    def _send(self, tag: Tag, target: int, tensor: Tensor, kind: str) -> None:
        # Under autocast, a stage computes in another data type than the receiver expects.
        message = tensor.detach().to(self._shapes.dtype)
        self._under_way.append(self._collective.start_send(message, target, tag, kind))
