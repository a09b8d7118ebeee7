"""Hooks a stage into the backward pass of the user's loss, by autograd functions on the network's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from resist_lightning.methods.auxnet.step.messages import Expected
from resist_lightning.methods.auxnet.step.store import Samples

if TYPE_CHECKING:
    from resist_lightning.methods.auxnet.step.worker import StageWorker


@contextmanager
def freed_graph_explained() -> Iterator[None]:
    """Explain torch's error of a graph that was freed, where a stage's own backward pass comes at another time."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "a backward pass came to a part of the graph that another one had freed. Where gradients are late, the "
            "loss may depend on the network's output alone: terms of features inside of the network (of hooks, or kept "
            "by a block) have no part in it. Leave them out, or give the strategy method='penalty', where each stage "
            "trains by such terms of its own."
        ) from error


@dataclass
class Batch:
    """The state of a worker's step on one batch.

    Args:
        size: number of samples.
        serial: whether the stages wait for each other.
        true_input: whether the stage is given the previous one's output, and not a guess.
        share: the learning rate as a share of the highest, when the batch came.
        x: the network's input.
        truth: the previous stage's output; None for the first stage.
        reply: the next worker's target, or (with true input) its gradient; None for the last stage.
        output: the network's output; None on the last worker.
        given: the input that the stage took instead of the image; None for the first stage.
        multiplier: u, in units of the guess.
        trained: whether there was a backward pass.
    """

    size: int
    serial: bool
    true_input: bool
    share: float
    x: Samples
    truth: Expected | None
    reply: Expected | None
    output: Expected | None
    given: Tensor | None = None
    multiplier: Tensor | None = None
    trained: bool = False


class ReplacedGradient(torch.autograd.Function):
    """Forward, the network's output; backward, a gradient from the next worker's reply replaces the loss's.

    ``anchor`` requires a gradient, so that a frozen stage has a backward pass too.
    """

    @staticmethod
    @override
    def forward(ctx: Any, made: Tensor, anchor: Tensor, output: Tensor, worker: StageWorker, batch: Batch) -> Tensor:
        """The network's output, whose gradient goes to ``made``, the stage's own."""
        ctx.made, ctx.worker, ctx.batch = made.detach(), worker, batch
        # autograd needs a tensor that is none of the inputs.
        return output.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *_: Any) -> Any:
        """The gradient at the stage's own output."""
        ctx.worker.begin_backward(ctx.batch)
        gradient = ctx.worker.reply_gradient(ctx.batch, ctx.made)
        return gradient.to(ctx.made.dtype), None, None, None, None


class LateGradients(torch.autograd.Function):
    """Forward, the network's output; backward, the stage's parameters get the gradients of an earlier batch."""

    @staticmethod
    @override
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, worker: StageWorker, batch: Batch, *parameters: Tensor
    ) -> Tensor:
        """The network's output."""
        ctx.worker, ctx.batch = worker, batch
        return output.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *_: Any) -> Any:
        """The gradients that are due."""
        ctx.worker.begin_backward(ctx.batch)
        return None, None, None, None, *ctx.worker.delayed.take_gradients()


class NotedBackward(torch.autograd.Function):
    """The identity on the last stage's output, which notifies the worker when the backward pass begins."""

    @staticmethod
    @override
    def forward(ctx: Any, made: Tensor, anchor: Tensor, worker: StageWorker, batch: Batch) -> Tensor:
        """The stage's output, which is the network's."""
        ctx.worker, ctx.batch = worker, batch
        # The user may change it in place, and `made` is being sent to the other workers.
        return made.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The loss's own gradient."""
        ctx.worker.begin_backward(ctx.batch)
        return gradients[0], None, None, None
