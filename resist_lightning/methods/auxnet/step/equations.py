"""The updates of one step of AuxNet with guesses (arXiv 2112.05387; docs/decisions/0019), in units of the guess.

For a boundary with |X| elements per sample: guess λ, truth Y, multiplier u = κ / β', gradient r = p / β' of the
later stages, where β' = β / |X|, since β weighs the *mean* square. All of them have the boundary's shape, with
the batch first, and p is that of a sample, not of the batch mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from resist_lightning.methods.auxnet.config import StageConfig


@dataclass(frozen=True)
class Penalty:
    """The weight of the distance between guess and truth, and the step size of the guess.

    Args:
        beta: weight of half the mean square of guess minus truth, above 0.
        step: step of the guess, in units of 1 / β', in (0, 1].
    """

    beta: float
    step: float

    @classmethod
    def of(cls, config: StageConfig, stages: int, share: float) -> Penalty:
        """The penalty of a step; ``share`` is the learning rate as a share of the highest so far."""
        step = config.lambda_step
        if step is None:
            step = default_step(stages, stored=config.stored)
        return cls(config.beta * growth(config.beta_growth, share), step)

    def per_element(self, guess: Tensor) -> float:
        """β' of a boundary; the batch is the first dimension."""
        return self.beta / math.prod(guess.shape[1:])

    def gradient(self, truth: Tensor, target: Tensor) -> Tensor:
        """q: the replacement for the back-propagated gradient of a sample at a stage's output.

        Args:
            truth: Y, the stage's output.
            target: λ + u of the next worker.
        """
        return self.per_element(truth) * (truth - target)

    def in_units_of_guess(self, gradient: Tensor) -> Tensor:
        """From p to r = p / β'."""
        return gradient / self.per_element(gradient)

    def next_guess(self, guess: Tensor, truth: Tensor, multiplier: Tensor | None, gradient: Tensor) -> Tensor:
        """λ⁺ = λ - c (λ - Y + u + r).

        Args:
            guess: λ.
            truth: Y.
            multiplier: u; None stands for 0.
            gradient: r.
        """
        direction = guess - truth + gradient
        if multiplier is not None:
            direction = direction + multiplier
        return guess - self.step * direction


def next_multiplier(guess: Tensor, truth: Tensor, multiplier: Tensor) -> Tensor:
    """u⁺ = u + λ - Y."""
    return multiplier + guess - truth


def mismatch(guess: Tensor, truth: Tensor) -> Tensor:
    """‖λ - Y‖ / ‖Y‖ over a batch; a number."""
    distance: Tensor = (guess - truth).norm()
    length: Tensor = truth.norm().clamp_min(1e-12)
    return distance / length


def default_step(stages: int, *, stored: bool) -> float:
    """c: the closed form's 1; a tenth for stored guesses of three stages or more, where 1 diverges (section 2.2, 4).

    An auxiliary network itself takes a small step only towards the closed form, so all of it may be its target.
    """
    return 0.1 if stored and stages > 2 else 1.0


def growth(factor: float, rate: float) -> float:
    """Growth of β so far, as a factor.

    Args:
        factor: growth for each factor of ten by which the learning rate has fallen.
        rate: learning rate as a share of the highest, in [0, 1].
    """
    if rate <= 0:
        return 1.0
    # Rates that were divided by ten in floating point miss whole powers by a rounding error.
    powers = math.floor(-math.log10(rate) + 1e-9)
    return factor**powers
