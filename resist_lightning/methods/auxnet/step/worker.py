"""A worker's side of the steps of a run: what its part of the network does when it is called, and what follows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resist_lightning.comm.collective import Collective
from resist_lightning.errors import PartialModelError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.aux_networks import make_aux_network
from resist_lightning.methods.auxnet.step.agreement import check_equal
from resist_lightning.methods.auxnet.step.guesses import Guesses, NetworkGuesses, StoredGuesses
from resist_lightning.methods.auxnet.step.join import Batch, Begun, Joined
from resist_lightning.methods.auxnet.step.learner import Learner
from resist_lightning.methods.auxnet.step.messages import Messages, Shapes
from resist_lightning.methods.auxnet.step.spans import Spans
from resist_lightning.methods.auxnet.step.store import Samples

CHECKED_STEPS = 3
"""First steps of a run in which the workers compare what they are given."""


class StageWorker:
    """Computes one stage in the place of the whole network.

    Called with the network's input, it returns the network's output, on every worker. The gradient that arrives at the
    output trains the last stage only; the others are trained by the distance of their own output from what the next
    worker wants.

    Args:
        stage: the worker's stage: one tensor in, one out.
        shapes: of what crosses the boundaries.
        nonnegative: whether what this stage is given comes out of a ReLU.
        config: the settings.
        collective: the workers; at least two.
        device: of the stage.
        rate: the learning rate now.

    Attributes:
        accumulate: batches whose gradients are added up before a step.
        epoch_batches: batches of all the data, after which a method that stores guesses must see samples again.
        steps: how many were taken.
        spans: when it computed, and when it waited.
    """

    def __init__(
        self,
        stage: nn.Module,
        shapes: Shapes,
        nonnegative: bool,
        config: StageConfig,
        *,
        collective: Collective,
        device: torch.device,
        rate: Callable[[], float],
    ) -> None:
        self.accumulate = 1
        self.epoch_batches = sys.maxsize
        self.steps = 0
        self.spans = Spans(device)
        self._stage = stage
        self._shapes = shapes
        self._config = config
        self._collective = collective
        self._messages = Messages(collective, shapes, device)
        self._guesses = self._make_guesses(nonnegative, device)
        self._learner = Learner(config, collective.workers, self._guesses, device)
        self._rate = rate
        self._highest_rate, self._share = 0.0, 1.0
        self._batch: Batch | None = None
        self._seen: set[bytes] = set()
        self._called = False
        self._misses = 0
        self._checks = CHECKED_STEPS
        self._first, self._last = collective.worker == 0, collective.worker == collective.workers - 1
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # there is a backward pass of a frozen stage

    @property
    def guesses(self) -> Guesses | None:
        """What makes this worker's guesses; None on worker 0, which has the image."""
        return self._guesses

    @property
    def held_bytes(self) -> int:
        """Bytes of what makes this worker's guesses: an auxiliary network with gradients and momentum, or a store."""
        return self._guesses.held_bytes if self._guesses is not None else 0

    def __call__(self, x: Tensor) -> Tensor:
        """The network's output for a batch of the network's input.

        Collective: every worker must call this, in the same order, with the same batch.

        Raises:
            ValueError: if the batch has another shape than the network was cut with.
            WorkersDisagree: if the workers have different batches; looked for in the first steps.
        """
        if self._batch is not None:
            self.spans.call_it("data")  # a batch whose gradients are being added up
        self.finish()
        self._check(x)
        self._called = True
        self.spans.begin("forward" if self._first else "aux forward")
        batch = self._batch = self._open(x)
        stage_input = self._stage_input(batch)
        if not self._first:
            self.spans.begin("forward")
        made: Tensor = self._stage(stage_input).to(self._shapes.dtype)
        if self._last:
            self._messages.send_output(made)
            self.spans.begin("loss")
            return Begun.apply(made, self._anchor, self, batch)  # type: ignore[no-any-return]
        self._messages.send_truth(made)
        self.spans.begin("wait for output")
        assert batch.output is not None
        output = batch.output.take()
        self.spans.begin("loss")
        return Joined.apply(made, self._anchor, output, self, batch)  # type: ignore[no-any-return]

    def count(self) -> None:
        """End a step, after the optimizer's. Waits for the neighbours.

        Raises:
            PartialModelError: if the network was not called in it.
        """
        self.finish()
        if not self._called:
            raise PartialModelError(
                "the network that is cut into stages was not called in this step. Call it as a whole in training_step, "
                "self.net(x); a way around it through its layers finds only those of one stage."
            )
        self._called = False
        self.steps += 1

    def finish(self) -> None:
        """End what was begun with the last batch: learn from how wrong the guess was. Waits for the neighbours."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        given, truth = batch.given, batch.truth
        if batch.serial and given is not None and given.grad is None:  # the worker before waits for it
            self._messages.send_gradient(torch.zeros_like(given))
        if batch.reply is not None:
            batch.reply.take()
        if truth is not None:
            self.spans.begin("wait for truth")
            truth.take()
        self._messages.settle()
        if given is not None and truth is not None and batch.trained:
            self.spans.begin("aux backward")
            self._learn(batch, given.detach(), truth.take(), given.grad if given.grad is not None else 0 * given)
        if self._config.stored and batch.trained:
            self._seen.update(batch.x.names)
        self.spans.end_step(counts=not batch.serial)

    def report(self) -> list[float]:
        """Mean mismatch of this worker's boundary since the last call, and mean seconds of each span."""
        return [self._learner.take_mismatch(), *self.spans.take()]

    def state_dict(self) -> dict[str, Any]:
        """What this worker needs to go on, beside its stage: numbers, strings, lists and tensors."""
        return {
            "steps": self.steps,
            "highest_rate": self._highest_rate,
            "share": self._share,
            "misses": self._misses,
            "seen": sorted(name.hex() for name in self._seen),
            "guesses": self._guesses.state_dict() if self._guesses is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` gave."""
        self.steps, self._highest_rate = state["steps"], state["highest_rate"]
        self._share, self._misses = state["share"], state["misses"]
        self._seen = {bytes.fromhex(name) for name in state["seen"]}
        if self._guesses is not None:
            self._guesses.load_state_dict(state["guesses"])

    def _make_guesses(self, nonnegative: bool, device: torch.device) -> Guesses | None:
        config, boundary = self._config, self._collective.worker
        if boundary == 0:
            return None
        if config.stored:
            return StoredGuesses(multipliers=config.multipliers)
        shape = self._shapes.boundaries[boundary - 1]
        network = make_aux_network(config, self._shapes.input, shape, nonnegative=nonnegative, boundary=boundary)
        return NetworkGuesses(network.to(device, self._shapes.dtype), config.aux_learning_rate)

    def _open(self, x: Tensor) -> Batch:
        """Post the receives of a batch."""
        samples = Samples(x)
        size, serial, messages = len(x), self._is_serial(samples), self._messages
        truth = None if self._first else messages.expect_truth(size)
        reply = output = None
        if not self._last:
            reply = messages.expect_gradient(size) if serial else messages.expect_target(size)
            output = messages.expect_output(size)
        return Batch(size, serial, self._rate_share(), samples, truth, reply, output)

    def _stage_input(self, batch: Batch) -> Tensor:
        """The image, or the guess, or (serial) what the worker before made; and tell the worker before."""
        if self._first:
            return batch.x.images
        assert batch.truth is not None
        if batch.serial:
            self.spans.begin("wait for truth")
            given = batch.truth.take().clone().requires_grad_()
            given.register_post_accumulate_grad_hook(lambda tensor: self._pass_on(tensor.grad))
        else:
            guess, batch.multiplier = self._learner.guess(batch.x, batch.share)
            self._messages.send_target(guess if batch.multiplier is None else guess + batch.multiplier)
            given = guess.requires_grad_()
        batch.given = given
        return given

    def _pass_on(self, gradient: Tensor | None) -> None:
        assert gradient is not None
        self._messages.send_gradient(gradient)

    def begin_backward(self, batch: Batch) -> None:
        """Called when the backward pass comes to the stage."""
        if batch is not self._batch:
            raise RuntimeError(
                "the network was called again before the backward pass of the call before. Call it once per "
                "training_step: workers that train stages at the same time exchange what belongs to one batch."
            )
        if batch.trained:
            raise RuntimeError(
                "a second backward pass came through one output of the network, and what the stages exchange belongs "
                "to one. Add the losses up, and call backward once."
            )
        batch.trained = True
        self.spans.begin("backward")
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def reply_gradient(self, batch: Batch, made: Tensor) -> Tensor:
        """The gradient of the batch mean of this stage's loss at its output."""
        assert batch.reply is not None
        with self.spans.inside("wait for target"):
            reply = batch.reply.take()
        if batch.serial:
            return reply
        return self._learner.gradient(made, reply, batch.share) / (batch.size * self.accumulate)

    def _end_backward(self) -> None:
        self.spans.begin("optimizer")

    def _learn(self, batch: Batch, given: Tensor, truth: Tensor, gradient: Tensor) -> None:
        of_sample = gradient * (batch.size * self.accumulate)
        if batch.serial:
            self._learner.begin_at(batch.x, truth, of_sample, batch.share)
            return
        guess = given, batch.multiplier
        self._learner.correct(batch.x, guess, truth, of_sample, share=batch.share, step=self.steps + 1)

    def _is_serial(self, x: Samples) -> bool:
        """Whether the stages wait for each other in this batch; every worker finds the same."""
        if self._config.serial(self.steps):
            return True
        if not self._config.stored:
            return False
        self._misses = 0 if self._seen.intersection(x.names) else self._misses + 1
        if self._misses > self.epoch_batches:
            raise ValueError(
                f"method={self._config.method!r} keeps guesses by sample, and of {self._misses} batches, more than all "
                "the data have, no sample was ever seen before: they are augmented anew. Take random transforms out of "
                "the collate function and the training_step (those of the data set are frozen), or use "
                "method='penalty' or 'al-net'."
            )
        return not self._seen.issuperset(x.names)

    def _rate_share(self) -> float:
        """The learning rate as a share of the highest so far; asked once per batch, on every worker."""
        rate = self._rate()
        if rate <= 0 < self._highest_rate:
            return self._share  # a schedule that ends at 0
        self._highest_rate = max(self._highest_rate, rate)
        self._share = rate / self._highest_rate if self._highest_rate else 1.0
        return self._share

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self._shapes.input:
            raise ValueError(
                f"the network is given {tuple(x.shape[1:])} and was cut with inputs of {self._shapes.input}: what "
                "crosses a boundary would have another shape. Bring all inputs to one size, and name with `input` "
                "which part of a batch the network is given."
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "what the network is given requires a gradient, so something before it is trained, and the gradient of "
                "a guess would not reach it. Make it a part of the network, or detach what the network is given."
            )
        if self._checks:
            self._checks -= 1
            check_equal(self._collective, {"the network's input": x}, f"step {self.steps}")
