"""Length of a round in local steps: fixed, or by a rule that follows the learning rate or the step.

The length is decided when a round begins, from values that all workers share. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

LONGEST = 2**40
"""Local steps of the longest round: a number that a header carries exactly, and that no training reaches."""

ROUNDING = 1e-9
"""A length this close below a whole number, relative to it, is that number: 0.3 / 0.1 is below 3 in floating point."""


@dataclass(frozen=True)
class QSR:
    """Rounds that grow as the learning rate falls: the quadratic synchronization rule (arXiv 2310.14423).

    A round has ``max(base, floor((coefficient / rate)²))`` local steps, by the learning rate at its beginning: that of
    the first parameter group of the first optimizer. Where it is 0 the round has ``base``. Less than a billionth below
    a whole number counts as that number.

    Args:
        base: local steps of the shortest round, at least 1.
        coefficient: above 0, in units of the learning rate: below ``coefficient / sqrt(base)`` rounds are longer than
            ``base``. The paper takes 0.0175 for AdamW at rates up to 0.008, with a base of 4.
        warmup_steps: number of first local steps; rounds that begin in them have ``base``. Set it where the learning
            rate rises at first: while it is small, the rule would give rounds of many thousand steps.

    Raises:
        ValueError: if a value is outside its limits.
    """

    follows_rate: ClassVar[bool] = True
    """Whether :meth:`of_round` needs a learning rate."""

    base: int
    coefficient: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        _check_whole("QSR", "base", self.base, 1)
        _check_whole("QSR", "warmup_steps", self.warmup_steps, 0)
        value: object = self.coefficient
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"QSR: coefficient={value!r} must be a finite number above 0.")

    @property
    def shortest(self) -> int:
        """Local steps of the shortest round."""
        return self.base

    def of_round(self, step: int, rate: float) -> int:
        """Local steps of the round that begins after ``step`` local steps, at a learning rate."""
        if step < self.warmup_steps or not rate > 0:
            return self.base
        root = self.coefficient / rate
        # The product may be infinite, which has no floor.
        return max(self.base, math.floor(min(root * root * (1 + ROUNDING), LONGEST)))

    def describe(self) -> str:
        """The rule in words, after "rounds of"."""
        warmup = f"; {self.base} in the first {self.warmup_steps}" if self.warmup_steps else ""
        return f"({self.coefficient:g} / learning rate)² local steps, at least {self.base}{warmup}"

    def unused(self, steps: int) -> str:
        """A warning of settings without effect in a run of ``steps`` local steps; empty if there are none."""
        if self.warmup_steps < steps:
            return ""
        return (
            f"local_steps={self}: warmup_steps cover all {steps} local steps of this training, so all rounds have "
            f"{self.base}."
        )


@dataclass(frozen=True)
class PostLocal:
    """Short rounds first, then longer ones: post-local SGD (arXiv 1808.07217).

    The first round that begins at ``switch_step`` or later is the first of the longer ones.

    Args:
        first: local steps of a round before ``switch_step``, at least 1; 1 averages after every step.
        then: local steps of a round from there on, at least 1.
        switch_step: local steps after which the rounds change; the paper takes the first drop of the learning rate.

    Raises:
        ValueError: if a value is outside its limits.
    """

    follows_rate: ClassVar[bool] = False
    """Whether :meth:`of_round` needs a learning rate."""

    first: int
    then: int
    switch_step: int

    def __post_init__(self) -> None:
        """Check every value."""
        _check_whole("PostLocal", "first", self.first, 1)
        _check_whole("PostLocal", "then", self.then, 1)
        _check_whole("PostLocal", "switch_step", self.switch_step, 0)

    @property
    def shortest(self) -> int:
        """Local steps of the shortest round."""
        return min(self.first, self.then)

    def of_round(self, step: int, rate: float) -> int:
        """Local steps of the round that begins after ``step`` local steps, at any learning rate."""
        return self.first if step < self.switch_step else self.then

    def describe(self) -> str:
        """The rule in words, after "rounds of"."""
        return f"{self.first} local steps, and of {self.then} from step {self.switch_step} on"

    def unused(self, steps: int) -> str:
        """A warning of settings without effect in a run of ``steps`` local steps; empty if there are none."""
        if self.switch_step < steps or self.first == self.then:
            return ""
        return (
            f"local_steps={self}: switch_step lies after the end of this training of {steps} local steps, so all "
            f"rounds have {self.first}."
        )


LocalStepsRule: TypeAlias = int | QSR | PostLocal


def shortest_round(rule: LocalStepsRule) -> int:
    """Local steps of the shortest round."""
    return rule if isinstance(rule, int) else rule.shortest


def rounds_in(rule: int | PostLocal, first: int, steps: int) -> int:
    """Number of rounds in a training of ``steps`` local steps from step ``first`` on, where a round begins."""
    rounds = 0
    if isinstance(rule, PostLocal):
        short = max(0, -(-(min(rule.switch_step, steps) - first) // rule.first))
        rounds, first = short, first + short * rule.first
    length = rule if isinstance(rule, int) else rule.then
    return rounds + max(0, -(-(steps - first) // length))


def in_words(rule: LocalStepsRule) -> str:
    """The lengths of rounds in words, after "rounds of"."""
    return f"{rule} local steps" if isinstance(rule, int) else rule.describe()


def _check_whole(of: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{of}: {name}={value!r} must be a whole number of at least {least}.")
