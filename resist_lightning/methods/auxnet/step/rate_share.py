"""The learning rate as a share of the highest so far, on which beta and the auxiliary networks' rates depend."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class RateShare:
    """Reads the rate, once per batch on every worker.

    Args:
        rate: gives the learning rate now.
    """

    def __init__(self, rate: Callable[[], float]) -> None:
        self._rate = rate
        self._highest = 0.0
        self._share = 1.0

    def now(self) -> float:
        """The share."""
        rate = self._rate()
        # A schedule that ends at 0 leaves the share where it was: it must not let beta grow without bounds.
        if rate <= 0 < self._highest:
            return self._share
        self._highest = max(self._highest, rate)
        self._share = rate / self._highest if self._highest else 1.0
        return self._share

    def state_dict(self) -> dict[str, float]:
        """The highest rate, and the last share."""
        return {"highest_rate": self._highest, "share": self._share}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume from a state that contains a :meth:`state_dict`."""
        self._highest, self._share = state["highest_rate"], state["share"]
