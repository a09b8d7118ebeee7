"""How long a worker's local steps take. Standard library only."""

from __future__ import annotations

from resist_lightning.activity import Activity


class Pace:
    """Measures wall time in local steps, without syncs and observations.

    ::

        sync | step step | evaluation, saving | step | sync
              ├─ counts ─┤                    ├counts┤

    Args:
        activity: of the worker.
    """

    def __init__(self, activity: Activity) -> None:
        self._seconds = 0.0
        self._steps = 0
        self._working = False
        self._since = 0.0
        self._step = 0
        activity.listeners.append(self._listen)

    def take(self) -> float:
        """Mean seconds of a local step since the last call; 0 if there was none."""
        mean = self._seconds / self._steps if self._steps else 0.0
        self._seconds, self._steps = 0.0, 0
        return mean

    def _listen(self, activity: Activity) -> None:
        if self._working:
            self._seconds += activity.since - self._since
            self._steps += activity.step - self._step
        self._working = activity.what == "local steps"
        self._since, self._step = activity.since, activity.step
