"""How much faster than serial training stages are, from what a step takes (Eq. 27 of the paper, as far as it is known).

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """What one step takes, in seconds; any other unit of time will do, if it is the same for all.

    Args:
        data: loading a batch (T_d of the paper); every worker loads for itself.
        forward: forward of the full network (T_f).
        backward: backward of the full network (T_b).
        penalty: evaluating the penalty and exchanging for it (t_psi).
        aux_forward: forward of an auxiliary network.
        aux_backward: backward and step of an auxiliary network.

    Raises:
        ValueError: if one is negative or not finite, or forward and backward take no time.
    """

    data: float
    forward: float
    backward: float
    penalty: float
    aux_forward: float
    aux_backward: float

    def __post_init__(self) -> None:
        """Check every value."""
        for name, value in ((each.name, getattr(self, each.name)) for each in fields(self)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number of seconds, 0 or more.")
        if self.forward + self.backward <= 0:
            raise ValueError("forward and backward of the network take no time, so there is nothing to speed up.")

    def predicted(self, workers: int) -> float:
        """Time of a step in serial training, divided by that in ``workers`` equal stages.

        It grows with the number of workers, and never reaches the value of :meth:`limit`.
        """
        return (self.data + self._network) / (self.data + self._extra + self._network / _checked(workers))

    def limit(self) -> float:
        """What :meth:`predicted` comes close to with many workers; infinity if nothing but the network takes time."""
        rest = self.data + self._extra
        return (self.data + self._network) / rest if rest > 0 else math.inf

    def pays(self, workers: int) -> bool:
        """Whether stages are predicted to be faster than serial training."""
        return self._network - self._network / _checked(workers) > self._extra

    @property
    def _network(self) -> float:
        return self.forward + self.backward

    @property
    def _extra(self) -> float:
        return self.penalty + self.aux_forward + self.aux_backward


def _checked(workers: int) -> int:
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    return workers
