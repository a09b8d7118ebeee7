"""Where a stage meets the user's loss: what the next worker wants takes the place of a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from resist_lightning.methods.auxnet.step.messages import Expected
from resist_lightning.methods.auxnet.step.store import Samples


@dataclass
class Batch:
    """What a worker knows of the batch at hand.

    Args:
        size: samples.
        serial: whether the stages wait for each other.
        share: the learning rate as a share of the highest, when the batch came.
        x: the network's input.
        truth: what this stage is really given; None for the first stage.
        reply: the next worker's target, or (serial) its gradient; None for the last stage.
        output: the network's output; None on the last worker.
        given: what the stage took instead of the image; None for the first stage.
        multiplier: u, in units of the guess.
        trained: whether there was a backward pass.
    """

    size: int
    serial: bool
    share: float
    x: Samples
    truth: Expected | None
    reply: Expected | None
    output: Expected | None
    given: Tensor | None = None
    multiplier: Tensor | None = None
    trained: bool = False


class Trainee(Protocol):
    """Who computes a stage, and is told of its backward pass."""

    def begin_backward(self, batch: Batch) -> None:
        """The backward pass comes to the stage."""

    def reply_gradient(self, batch: Batch, made: Tensor) -> Tensor:
        """The gradient at the stage's output."""


class Joined(torch.autograd.Function):
    """The network's output, hung on the stage's own: what flows back is what the next worker wants."""

    @staticmethod
    @override
    def forward(ctx: Any, made: Tensor, anchor: Tensor, output: Tensor, trainee: Trainee, batch: Batch) -> Tensor:
        """The network's output."""
        ctx.made, ctx.trainee, ctx.batch = made.detach(), trainee, batch
        return output.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *_: Any) -> Any:
        """Of the stage's output."""
        ctx.trainee.begin_backward(ctx.batch)
        gradient = ctx.trainee.reply_gradient(ctx.batch, ctx.made)
        return gradient.to(ctx.made.dtype), None, None, None, None


class Begun(torch.autograd.Function):
    """The last stage's output, which is the network's; notes when the backward pass begins."""

    @staticmethod
    @override
    def forward(ctx: Any, made: Tensor, anchor: Tensor, trainee: Trainee, batch: Batch) -> Tensor:
        """The stage's output."""
        ctx.trainee, ctx.batch = trainee, batch
        return made.clone()  # the user may change it in place; `made` is on its way to the others

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The user's."""
        ctx.trainee.begin_backward(ctx.batch)
        return gradients[0], None, None, None
