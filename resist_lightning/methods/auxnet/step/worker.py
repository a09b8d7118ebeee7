"""Computes a worker's stage in place of the whole network, and trains it by messages from its neighbours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.errors import PartialModelError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.chain import Stage
from resist_lightning.methods.auxnet.step.agreement import check_equal
from resist_lightning.methods.auxnet.step.backward import Batch, LateGradients, NotedBackward, ReplacedGradient
from resist_lightning.methods.auxnet.step.delayed import make_delayed
from resist_lightning.methods.auxnet.step.equations import Penalty
from resist_lightning.methods.auxnet.step.guesses import Guesses, make_guesses
from resist_lightning.methods.auxnet.step.messages import Messages, Shapes
from resist_lightning.methods.auxnet.step.rate_share import RateShare
from resist_lightning.methods.auxnet.step.spans import Spans
from resist_lightning.methods.auxnet.step.store import Samples, SeenSamples
from resist_lightning.state.random_state import RandomStream

CHECKED_STEPS = 3
"""First steps of a run in which the workers compare their batches."""


class StageWorker:
    """Computes one stage in the place of the whole network.

    Called with the network's input, it returns the network's output, on every worker. The gradient at that output
    trains the last stage only; the others are trained by the reply of the next worker: its target or its gradient.

    Args:
        stage: the worker's stage: one tensor in, one out.
        shapes: shapes of the tensors that cross the boundaries.
        nonnegative: whether the input of this stage is the output of a ReLU.
        config: the settings.
        collective: the workers; at least two.
        device: device of the stage.
        rate: gives the learning rate now.

    Attributes:
        accumulate: number of batches whose gradients are added up before a step.
        epoch_batches: number of batches in an epoch, after which a method that stores guesses must see samples again.
        delayed: trains this stage with gradients that arrive late; None on the last worker, and for other methods.
        guesses: makes the guesses of this stage's input; None where there are none, as on worker 0: it has the image.
        steps: number of steps taken.
        spans: records the times of computing and waiting.
    """

    def __init__(
        self,
        stage: Stage,
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
        self.delayed = make_delayed(stage, config, self._messages, self.spans, collective, device)
        self.guesses = make_guesses(config, shapes, nonnegative, collective=collective, device=device)
        self._first = collective.worker == 0
        self._last = collective.worker == collective.workers - 1
        self._rate_share = RateShare(rate)
        # A forward pass opens the batch, and the next one, or the end of the step, finishes it.
        self._batch: Batch | None = None
        self._called = False
        self._seen = SeenSamples()
        self._checks = CHECKED_STEPS
        # Stages draw unequal numbers (dropout), and what training_step draws must stay equal on all workers.
        self._random = RandomStream(f"stage {collective.worker}")
        # With this anchor, the output requires a gradient even if the stage itself is frozen.
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        """The network's output for a batch of the network's input.

        Collective: every worker must call this, in the same order, with the same batch.

        Raises:
            ValueError: if the batch has another shape, or the forward reads other numbers, than when it was traced.
            WorkersDisagree: if the workers have different batches; checked in the first steps.
        """
        if self._batch is not None:
            # Gradients are being accumulated: no optimizer came between the last batch and this one.
            self.spans.rename("data")
        self.finish()
        self._check(x)
        self._called = True
        self.spans.begin("forward" if self._first else "aux forward")
        batch = self._batch = self._open(x)
        # The previous worker's message leaves before this stage computes, so that both compute at the same time.
        stage_input = self._stage_input(batch)
        if not self._first:
            self.spans.begin("forward")
        with self._random.drawn():
            made = self._pass_forward(stage_input, batch).to(self._shapes.dtype)
        if self._last:
            self._messages.send_output(made)
            self.spans.begin("loss")
            return NotedBackward.apply(made, self._anchor, self, batch)  # type: ignore[no-any-return]
        self._messages.send_truth(made)
        if self.delayed is not None:
            # While the stages behind work on this batch, whose gradient arrives after losses that may need this worker.
            self.delayed.work_off(but=1)
        self.spans.begin("wait for output")
        assert batch.output is not None
        output = batch.output.take()
        self.spans.begin("loss")
        if self.delayed is not None:
            due = self.delayed.due_parameters
            return LateGradients.apply(self._anchor, output, self, batch, *due)  # type: ignore[no-any-return]
        return ReplacedGradient.apply(made, self._anchor, output, self, batch)  # type: ignore[no-any-return]

    def end_step(self) -> None:
        """End a step, after the optimizer's. Waits for the neighbours.

        Raises:
            PartialModelError: if the network was not called in it.
        """
        self.finish()
        if not self._called:
            raise PartialModelError(
                "the network that is cut into stages was not called in this step. Call it as a whole in training_step, "
                "self.net(x); calling its layers directly reaches only this worker's stage."
            )
        self._called = False
        self.steps += 1
        if self.delayed is not None:
            self.delayed.end_step()

    def finish(self) -> None:
        """Finish the last batch: receive its messages, and correct the guess. Waits for the neighbours."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        given = batch.given
        at_once = batch.true_input and self.delayed is None
        if at_once and given is not None and given.grad is None:
            # Nothing flowed back, and the previous worker waits for a gradient.
            self._messages.send_gradient(torch.zeros_like(given))
        # Also of a batch that is not trained on: a message left behind would be taken for the next batch's.
        if batch.reply is not None:
            batch.reply.take()
        if batch.truth is not None:
            self.spans.begin("wait for truth")
            batch.truth.take()
        self._messages.settle()
        if batch.trained:
            if self.guesses is not None:
                with self._random.drawn():
                    self._correct_guess(batch, self.guesses)
            if self._config.stored:
                self._seen.add(batch.x)
        self.spans.end_step(counts=not batch.serial)

    @property
    def held_bytes(self) -> int:
        """Bytes kept between two steps beside the stage: for guesses, or for late gradients."""
        return sum(part.held_bytes for part in (self.guesses, self.delayed) if part is not None)

    def report(self) -> list[float]:
        """Mean mismatch of this worker's boundary since the last call, and mean seconds of each span."""
        mismatch = self.guesses.take_mismatch() if self.guesses is not None else 0.0
        return [mismatch, *self.spans.take()]

    def state_dict(self) -> dict[str, Any]:
        """This worker's resume state, without its stage: numbers, strings, lists and tensors."""
        return {
            "steps": self.steps,
            **self._rate_share.state_dict(),
            **self._seen.state_dict(),
            "random": self._random.state_dict(),
            "guesses": self.guesses.state_dict() if self.guesses is not None else {},
            "delayed": self.delayed.state_dict() if self.delayed is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a :meth:`state_dict`."""
        self.steps = state["steps"]
        self._rate_share.load_state_dict(state)
        self._seen.load_state_dict(state)
        self._random.load_state_dict(state.get("random", {}))
        if self.guesses is not None:
            self.guesses.load_state_dict(state["guesses"])
        if self.delayed is not None:
            self.delayed.load_state_dict(state["delayed"])

    def _pass_forward(self, stage_input: Tensor, batch: Batch) -> Tensor:
        if self.delayed is None:
            return self._stage(stage_input)  # type: ignore[no-any-return]
        assert batch.reply is not None
        # Taken when it is due, in a later batch.
        reply, batch.reply = batch.reply, None
        return self.delayed.forward(stage_input, reply, self.accumulate, warmup=batch.serial)

    def _open(self, x: Tensor) -> Batch:
        """Post the receives of a batch."""
        samples = Samples(x)
        size, serial = len(x), self._config.serial(self.steps)
        if not serial and self._config.stored:
            serial = self._seen.lacks(samples, self.epoch_batches)
        true_input = serial or self._config.delayed
        truth = None if self._first else self._messages.expect_truth(size)
        reply = output = None
        if not self._last:
            reply = self._messages.expect_gradient(size) if true_input else self._messages.expect_target(size)
            output = self._messages.expect_output(size)
        return Batch(size, serial, true_input, self._rate_share.now(), samples, truth, reply, output)

    def _stage_input(self, batch: Batch) -> Tensor:
        """The image, the previous stage's output, or the guess; the guess is sent to the previous worker."""
        if self._first:
            return batch.x.images
        if batch.true_input:
            assert batch.truth is not None
            self.spans.begin("wait for truth")
            given = batch.truth.take().clone().requires_grad_()
            # The gradient is sent at once: the previous worker's backward pass waits for it.
            given.register_post_accumulate_grad_hook(self._send_gradient_of)
        else:
            assert self.guesses is not None
            with self._random.drawn():
                guess, batch.multiplier = self.guesses.guess(batch.x, batch.share)
            target = guess if batch.multiplier is None else guess + batch.multiplier
            self._messages.send_target(target)
            given = guess.requires_grad_()
        batch.given = given
        return given

    def _send_gradient_of(self, given: Tensor) -> None:
        assert given.grad is not None
        self._messages.send_gradient(given.grad)

    def begin_backward(self, batch: Batch) -> None:
        """Called when the backward pass reaches the network's output."""
        if batch is not self._batch:
            raise RuntimeError(
                "the network was called again before the backward pass of the previous call, or the full model was "
                "assembled in between, to save or evaluate it. Call the network once per training_step, and save "
                "behind the step (on_train_batch_end): the messages of the stages belong to one batch."
            )
        if batch.trained:
            raise RuntimeError(
                "a second backward pass reached the same output of the network, but the messages of the stages belong "
                "to one pass. Add the losses up, and call backward once."
            )
        batch.trained = True
        self.spans.begin("backward")
        # Called by autograd at the end of the whole pass.
        torch.autograd.Variable._execution_engine.queue_callback(partial(self.spans.begin, "optimizer"))

    def reply_gradient(self, batch: Batch, made: Tensor) -> Tensor:
        """The gradient of the batch mean of this stage's loss at its output."""
        assert batch.reply is not None
        with self.spans.inside("wait for target"):
            reply = batch.reply.take()
        if batch.serial:
            return reply
        penalty = Penalty.of(self._config, self._collective.workers, batch.share)
        return penalty.gradient(made, reply) / (batch.size * self.accumulate)

    def _correct_guess(self, batch: Batch, guesses: Guesses) -> None:
        assert batch.given is not None
        assert batch.truth is not None
        self.spans.begin("aux backward")
        given, truth = batch.given.detach(), batch.truth.take()
        # Nothing flows back out of a stage that begins with a detached tensor.
        gradient = batch.given.grad if batch.given.grad is not None else torch.zeros_like(given)
        of_sample = gradient * (batch.size * self.accumulate)
        if batch.serial:
            guesses.begin_at(batch.x, truth, of_sample, batch.share)
        else:
            guess = given, batch.multiplier
            guesses.correct(batch.x, guess, truth, of_sample, share=batch.share, step=self.steps + 1)

    def _check(self, x: Tensor) -> None:
        self._stage.attributes.check()
        self._shapes.check_input(x)
        if self._checks:
            self._checks -= 1
            check_equal(self._collective, {"the network's input": x}, f"step {self.steps}")
