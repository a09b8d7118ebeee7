"""Tracks a worker's round and step, its current activity, and the time of its local steps. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from resist_lightning.schedule.round_length import QSR, LocalStepsRule, PostLocal, rounds_in

ActivityName: TypeAlias = Literal[
    "starting", "local steps", "handshake", "averaging", "hand_over", "evaluation", "saving", "finishing", "ended"
]


class Activity:
    """A worker's current activity, and its position in the run; other threads may read it.

    Attributes:
        what: the name of the activity.
        round: the round in which it began; for a sync, the round that ends.
        step: local steps taken in the round by then.
        since: ``time.monotonic()`` of its beginning.
        listeners: called with this object whenever the activity changes.
    """

    def __init__(self, clock: Clock) -> None:
        self.listeners: list[Callable[[Activity], None]] = []
        self._clock = clock
        self.begin("starting")

    def begin(self, what: ActivityName) -> None:
        """Set the activity to ``what``, and call the listeners."""
        self.what: ActivityName = what
        self.round = self._clock.round
        self.step = self._clock.step
        self.since = time.monotonic()
        for listener in self.listeners:
            listener(self)

    @contextmanager
    def during(self, what: ActivityName) -> Iterator[None]:
        """Inside, the activity is ``what``; afterwards the one before, unless an error ends it there."""
        before = self.what
        self.begin(what)
        # No `finally`: after an error, heartbeats must still name the activity in which it happened.
        yield
        self.begin(before)

    def describe(self) -> str:
        """The activity in words, e.g. ``hand-over, round 2, local step 50``."""
        return f"{self.what.replace('_', '-')}, round {self.round}, local step {self.step}"


class StepTimer:
    """Measures the wall time of local steps, without syncs and observations.

    ::

        sync | step step | evaluation, saving | step | sync
              ├─ counts ─┤                    ├counts┤
    """

    def __init__(self, activity: Activity) -> None:
        self._seconds = 0.0
        self._steps = 0
        # The last activity: whether it was local steps, and where it began.
        self._stepping = False
        self._since = 0.0
        self._step = 0
        activity.listeners.append(self._on_change)

    def take(self) -> float:
        """Mean seconds of a local step since the last call; 0 if there was none."""
        mean = self._seconds / self._steps if self._steps else 0.0
        self._seconds, self._steps = 0.0, 0
        return mean

    def _on_change(self, activity: Activity) -> None:
        # Each activity is accounted for when the next one begins.
        if self._stepping:
            self._seconds += activity.since - self._since
            self._steps += activity.step - self._step
        self._stepping = activity.what == "local steps"
        self._since, self._step = activity.since, activity.step


def one_round(steps: int, clock: Clock) -> str:
    """Warning text for a training of some local steps that ends before the round of ``clock`` does."""
    has, way_out = f"local_steps={clock.local_steps}", f"Set local_steps to {max(1, steps // 10)} or so"
    if clock.rule is not None:
        has = f"{clock.local_steps} by local_steps={clock.rule}"
        way_out = "Choose shorter rounds (where the learning rate begins low, by the warmup_steps of QSR)"
    return (
        f"this training has {steps} local steps, and a round has {has}: the workers will average only once, at the "
        f"end of the training. {way_out}, or train longer."
    )


@dataclass
class Clock:
    """The position in a run: the round, and the local steps taken in it.

    A round ends after ``local_steps`` local steps, wherever the borders of the epochs fall.

    Args:
        local_steps: length of this round.
        round: its number, counted from 0.
        step: local steps taken in it.
        steps_before: local steps taken in the rounds before it.
        rule: decides the length of the next round; None: that of this one.
        rate: gives the learning rate now; None where no optimizer has one.
        overlap_of: gives, for a round, the local steps at its end during which its sync is under way; fewer than all.

    Raises:
        ValueError: if the rule needs a learning rate and there is none.
    """

    local_steps: int
    round: int = 0
    step: int = 0
    steps_before: int = 0
    rule: QSR | PostLocal | None = None
    rate: Callable[[], float | None] = field(default=lambda: None, repr=False)
    overlap_of: Callable[[int], int] = field(default=lambda _: 0, repr=False)
    _rate_at_first: float = field(default=float("inf"), init=False, repr=False, compare=False)

    @classmethod
    def by(
        cls,
        setting: LocalStepsRule,
        rate: Callable[[], float | None],
        overlap_of: Callable[[int], int] = lambda _: 0,
    ) -> Clock:
        """A clock at the beginning of a run; ``setting`` is the option ``local_steps``, the others are the class's."""
        if isinstance(setting, int):
            return cls(setting, overlap_of=overlap_of)
        clock = cls(setting.shortest, rule=setting, rate=rate, overlap_of=overlap_of)
        clock.begin_round()
        return clock

    def __post_init__(self) -> None:
        """Check that there is a learning rate if the rule needs one."""
        if self.rule is not None and self.rule.follows_rate and self.rate() is None:
            raise ValueError(
                f"local_steps={self.rule} follows the learning rate, but no optimizer has one (a parameter group with "
                "'lr'). Give a number of local steps, or PostLocal(first, then, switch_step)."
            )

    @property
    def overlap(self) -> int:
        """Local steps at the end of this round during which its sync is under way."""
        return self.overlap_of(self.round)

    @property
    def due(self) -> bool:
        """Whether the round is complete, so that a sync must come before the next local step."""
        return self.step >= self.local_steps

    @property
    def at_border(self) -> bool:
        """Whether the sync of this round must have begun: ``overlap`` local steps before the round is complete."""
        return self.step >= self.local_steps - self.overlap

    @property
    def steps_left(self) -> int:
        """Local steps until the round is complete."""
        return max(self.local_steps - self.step, 0)

    @property
    def total_steps(self) -> int:
        """Local steps since the run began."""
        return self.steps_before + self.step

    @property
    def agreed_steps(self) -> int:
        """The round length that all workers must agree on: of the next round if this one is complete, else of this."""
        return self._length_after(self.total_steps) if self.due else self.local_steps

    @property
    def rate_rose(self) -> bool:
        """Whether the learning rate that made this round long has risen since: the round should have been shorter."""
        if self.rule is None or not self.rule.follows_rate or self.local_steps == self.rule.shortest:
            return False
        return (self.rate() or 0.0) > self._rate_at_first

    def rounds_by(self, steps: int) -> int:
        """Number of rounds that have begun when ``steps`` more are taken, if no learning rate changes their length."""
        rule = self.rule if isinstance(self.rule, PostLocal) else self.local_steps
        return self.round + rounds_in(rule, self.steps_before, self.total_steps + steps)

    def tick(self) -> None:
        """Count one local step."""
        self.step += 1

    def next_round(self) -> None:
        """Begin the next round."""
        self.steps_before += self.step
        self.round += 1
        self.step = 0
        self.begin_round()

    def begin_round(self) -> None:
        """Decide the length of this round, which has not begun: the rate may have been set since."""
        self.local_steps = self._length_after(self.steps_before)
        self._rate_at_first = self.rate() or 0.0

    def resume_round(self, local_steps: int) -> None:
        """Go on in a round of known length, whose first learning rate is not known."""
        self.local_steps = local_steps
        self._rate_at_first = float("inf")

    def _length_after(self, steps: int) -> int:
        return self.local_steps if self.rule is None else self.rule.of_round(steps, self.rate() or 0.0)
