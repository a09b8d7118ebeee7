"""Where to cut a network so that its slowest stage is as fast as can be. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence


def balance(seconds: Sequence[float], stages: int, entry: Sequence[float] | None = None) -> tuple[int, ...]:
    """Cuts with the smallest possible largest stage; of several such choices, that with the earliest cuts.

    Args:
        seconds: time of each unit, in order of computation; finite and not negative.
        stages: number of stages, between 1 and the number of units; each gets at least one unit.
        entry: for each unit, what a stage that begins with it takes besides its units: its auxiliary network; of the
            first, which has none, 0. Infinity where no stage can begin. None for no such time.

    Returns:
        Numbers of units before each cut, ascending; ``stages`` - 1 of them.

    Raises:
        ValueError: if an argument is outside its limits.
    """
    units = len(seconds)
    if not 1 <= stages <= units:
        raise ValueError(f"stages={stages} must lie between 1 and the number of units, {units}.")
    entry = [0.0] * units if entry is None else entry
    if any(not 0 <= time < math.inf for time in seconds) or any(not time >= 0 for time in entry):
        raise ValueError(f"seconds={list(seconds)} must be finite and not negative, entry={list(entry)} not negative.")
    time = [[math.fsum([entry[first], *seconds[first:last]]) for last in range(units + 1)] for first in range(units)]
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
