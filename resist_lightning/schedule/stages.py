"""Least share of the parts that each worker holds, by round, in a run that grows or ends whole.

Pure functions of the settings and the number of the last round. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import QSR, LocalStepsRule, rounds_in


@dataclass(frozen=True)
class Stages:
    """Least shares of the parts, by round.

    Args:
        shares: for a run that grows, the least share from a round on, until the next entry.
        finish_from: the round from which every worker holds everything; None if none is known.
    """

    shares: tuple[tuple[int, float], ...] = ()
    finish_from: int | None = None

    def least(self, round: int, usual: float) -> float:
        """The least share that a worker holds in a round; ``usual`` where neither growth nor finish decide."""
        if self.finish_from is not None and round >= self.finish_from:
            return 1.0
        for first, share in reversed(self.shares):
            if round >= first:
                return share
        return usual


NO_STAGES = Stages()
"""All rounds are as usual."""


def check_growth(growth: object) -> None:
    """Raise a ValueError unless ``growth`` is a list of shares that do not fall."""
    shares = list(growth) if isinstance(growth, Sequence) and not isinstance(growth, str) else []
    if any(isinstance(share, bool) or not isinstance(share, int | float) for share in shares) or not shares:
        raise ValueError(f"growth={growth!r} must be a list of shares, such as [0.25, 0.5, 1].")
    if not (shares[0] > 0 and shares == sorted(shares) and shares[-1] <= 1):
        raise ValueError(f"growth={growth!r}: shares must lie in (0, 1] and not fall, such as [0.25, 0.5, 1].")


def plan_stages(
    growth: Sequence[float],
    finish_rounds: int,
    rule: LocalStepsRule,
    clock: Clock,
    total_steps: int | None,
    *,
    by: str,
    first: int = 0,
) -> Stages:
    """Count back from the end of a run to the rounds in which its stages and its finish begin.

    Args:
        growth: the shares, each for equally many rounds; empty if the run does not grow.
        finish_rounds: last rounds with everything on all workers.
        rule: lengths of rounds.
        clock: the position in the run, at the beginning of a round or in it.
        total_steps: local steps from the run's beginning to its end; None if that is not known.
        by: the setting that needs to know the end, in words, for the error.
        first: the round in which growth begins, after a warm-up.

    Raises:
        ValueError: if it is not known which rounds are the last, or ``total_steps`` is no whole number.
    """
    if total_steps is None or isinstance(rule, QSR):
        raise ValueError(
            f"{by} needs the number of local steps of the run, which is not known: set max_steps, or max_epochs with "
            "data of known length (without Lightning: total_steps of Engine and Simulator)."
        )
    given: object = total_steps
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(
            f"total_steps={total_steps!r} must be a whole number of at least 0: the local steps of the run from its "
            f"beginning to its end, which {by} needs."
        )
    left = rounds_in(rule, clock.steps_before, total_steps)
    last = clock.round + left - finish_rounds
    shares = []
    for number, share in enumerate(growth):
        # Stages of equally many rounds, between the warm-up and the finish.
        begins = first + number * max(0, last - first) // len(growth)
        shares.append((begins, share))
    return Stages(tuple(shares), last if finish_rounds else None)


def never_divided(warmup_rounds: int, finish_from: int | None, rounds: int, parts: str) -> str:
    """A warning of a training whose warm-up and finish cover all of its rounds; empty if they do not.

    Args:
        warmup_rounds: first rounds in which every worker holds everything.
        finish_from: the round from which every worker holds everything; None if there is none.
        rounds: number of rounds of the training.
        parts: name of a method's parts, in the plural.
    """
    finished = finish_from is not None and finish_from <= warmup_rounds
    if not finished and rounds > warmup_rounds:
        return ""
    names = [*(["warmup_rounds"] if warmup_rounds else []), *(["finish_rounds"] if finished else [])]
    return (
        f"{' and '.join(names)} cover all {rounds} rounds of this training: every worker always holds all {parts}, as "
        "with local_sgd. Choose fewer of these rounds or shorter ones, or train longer."
    )


def parts_of(share: float, parts: int) -> int:
    """Number of parts in a share, at least one; 0.1 of ten parts is one, whatever the last bit of 0.1 is."""
    return max(min(1, parts), math.ceil(share * parts - 1e-9))
