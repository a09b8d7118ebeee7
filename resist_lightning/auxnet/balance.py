"""Where to cut a network so that its slowest stage is as fast as can be. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence


def balance(seconds: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cuts with the smallest possible largest stage; of several such choices, that with the earliest cuts.

    Args:
        seconds: time of each unit, in order of computation; finite and not negative.
        stages: number of stages, between 1 and the number of units; each gets at least one unit.

    Returns:
        Numbers of units before each cut, ascending; ``stages`` - 1 of them.

    Raises:
        ValueError: if an argument is outside its limits.
    """
    units = len(seconds)
    if not 1 <= stages <= units:
        raise ValueError(f"stages={stages} must lie between 1 and the number of units, {units}.")
    if any(not 0 <= time < math.inf for time in seconds):
        raise ValueError(f"seconds={list(seconds)} must be finite and not negative.")
    time = [[math.fsum(seconds[first:last]) for last in range(units + 1)] for first in range(units + 1)]
    # slowest[n][first]: the slowest of n stages that divide the units from ``first`` on, at best
    slowest = [[math.inf] * (units + 1) for _ in range(stages + 1)]
    slowest[0][units] = 0.0
    for count in range(1, stages + 1):
        for first in range(units):
            slowest[count][first] = min(
                max(time[first][last], slowest[count - 1][last]) for last in range(first + 1, units + 1)
            )
    cuts = [0]
    for count in range(stages - 1, 0, -1):
        ends = range(cuts[-1] + 1, units)
        cuts.append(next(e for e in ends if max(time[cuts[-1]][e], slowest[count][e]) <= slowest[stages][0]))
    return tuple(cuts[1:])
