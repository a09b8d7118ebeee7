"""Cuts a network into stages so that the slowest one is as fast as possible. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence


def balance(seconds: Sequence[float], stages: int, entry: Sequence[float] | None = None) -> tuple[int, ...]:
    """The cuts that make the largest stage as small as possible; among equal choices, the earliest cuts.

    Args:
        seconds: time of each unit, in order of computation; finite and not negative.
        stages: number of stages, between 1 and the number of units; each gets at least one unit.
        entry: for each unit, the additional time of a stage that begins with it, for its auxiliary network; 0 for the
            first, which has none. Infinity where no stage can begin. None for no such time.

    Returns:
        Numbers of units before each cut, ascending; ``stages`` - 1 of them.

    Raises:
        ValueError: if an argument is outside its limits.
    """
    units = len(seconds)
    if not 1 <= stages <= units:
        raise ValueError(f"stages={stages} must lie between 1 and the number of units, {units}.")
    entry = [0.0] * units if entry is None else entry
    # Written so that NaN fails too.
    finite = all(0 <= time < math.inf for time in seconds)
    if not finite or not all(time >= 0 for time in entry):
        raise ValueError(f"seconds={list(seconds)} must be finite and not negative, entry={list(entry)} not negative.")
    # time[first][last]: time of a stage of the units from `first` to before `last`.
    time: list[list[float]] = []
    for first in range(units):
        # fsum rounds once, so that equal stages compare as equal, however their units are added up.
        row = []
        for last in range(units + 1):
            row.append(math.fsum([entry[first], *seconds[first:last]]))
        time.append(row)
    # slowest[n][first]: least time of the slowest of n stages that divide the units from `first` on.
    slowest = [[math.inf] * (units + 1) for _ in range(stages + 1)]
    slowest[0][units] = 0.0
    for count in range(1, stages + 1):
        for first in range(units):
            for last in range(first + 1, units + 1):
                slower = max(time[first][last], slowest[count - 1][last])
                slowest[count][first] = min(slowest[count][first], slower)
    # The earliest end of each stage with which no stage is slower than the best choice allows.
    cuts: list[int] = []
    first = 0
    for count in range(stages - 1, 0, -1):
        end = first + 1
        while max(time[first][end], slowest[count][end]) > slowest[stages][0]:
            end += 1
        cuts.append(end)
        first = end
    return tuple(cuts)
