"""The equations of a step at one worker: what its output should have been, and what its guess."""

from __future__ import annotations

import torch
from torch import Tensor

from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.step.equations import Penalty, default_step, growth, mismatch, next_multiplier
from resist_lightning.methods.auxnet.step.guesses import Guesses
from resist_lightning.methods.auxnet.step.store import Samples


class Learner:
    """Applies the settings of a run to the tensors of a batch.

    ``share`` is the learning rate of the batch as a share of the highest so far: beta grows as it falls. Multipliers
    are kept in units of the first beta.

    Args:
        config: the settings.
        stages: how many there are.
        guesses: what makes this worker's guesses; None for the first stage.
        device: of the stage.
    """

    def __init__(self, config: StageConfig, stages: int, guesses: Guesses | None, device: torch.device) -> None:
        self.guesses = guesses
        self._config = config
        self._step = default_step(stages, stored=config.stored) if config.lambda_step is None else config.lambda_step
        self._mismatch = torch.zeros((), device=device)
        self._batches = 0

    def gradient(self, made: Tensor, target: Tensor, share: float) -> Tensor:
        """q: of each sample, at the output ``made`` of a stage whose next one wants ``target``."""
        return self._penalty(share).gradient(made, target)

    def guess(self, x: Samples, share: float) -> tuple[Tensor, Tensor | None]:
        """λ and u for a batch of images."""
        assert self.guesses is not None
        guess, multiplier = self.guesses.make(x)
        return guess, multiplier / self._growth(share) if multiplier is not None else None

    def correct(
        self,
        x: Samples,
        guess: tuple[Tensor, Tensor | None],
        truth: Tensor,
        gradient: Tensor,
        *,
        share: float,
        step: int,
    ) -> None:
        """Move the guess, and in every so many steps the multiplier.

        Args:
            x: the images.
            guess: λ and u, as :meth:`guess` gave them.
            truth: Y.
            gradient: p, of each sample.
            share: of the highest learning rate.
            step: number of the step, from 1.
        """
        penalty, (given, multiplier) = self._penalty(share), guess
        after = penalty.next_guess(given, truth, multiplier, penalty.in_units_of_guess(gradient))
        if multiplier is not None and step % self._config.multiplier_every == 0:
            multiplier = next_multiplier(given, truth, multiplier)
        self._mismatch += mismatch(given, truth)
        self._batches += 1
        self._learn(x, after, multiplier, share)

    def begin_at(self, x: Samples, truth: Tensor, gradient: Tensor, share: float) -> None:
        """Learn from a step in which the stage was given the truth.

        A multiplier begins where all stands still, at -r; a stored guess where the stage before is then given the true
        gradient; an auxiliary network begins with the truth.
        """
        after = self._penalty(share).in_units_of_guess(gradient)
        guess = truth - after if self._config.method == "penalty-store" else truth
        self._learn(x, guess, -after if self._config.multipliers else None, share)

    def take_mismatch(self) -> float:
        """Mean over the batches since the last call; 0 if there was none."""
        found = float(self._mismatch) / self._batches if self._batches else 0.0
        self._mismatch.zero_()
        self._batches = 0
        return found

    def _learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, share: float) -> None:
        assert self.guesses is not None
        self.guesses.learn(x, guess, multiplier * self._growth(share) if multiplier is not None else None, share)

    def _penalty(self, share: float) -> Penalty:
        return Penalty(self._config.beta * self._growth(share), self._step)

    def _growth(self, share: float) -> float:
        return growth(self._config.beta_growth, share)
