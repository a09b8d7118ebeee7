"""Predicts the speed-up of stages over serial training (Eq. 27 of the paper, as third-party summaries have it).

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """The seconds of a step, by cause; any other unit of time will do, if it is the same for all.

    Args:
        data: loading a batch (T_d of the paper); every worker loads for itself.
        forward: forward of the full network (T_f).
        backward: backward of the full network (T_b).
        penalty: evaluation of the penalty, with its messages (t_psi).
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
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name}={value!r} must be a finite number of seconds, 0 or more.")
        if self.forward + self.backward <= 0:
            raise ValueError("forward and backward of the network take no time, so there is nothing to speed up.")

    def predicted(self, workers: int) -> float:
        """Time of a step in serial training, divided by that in ``workers`` equal stages.

        It grows with the number of workers, and stays below serial time / (data + penalty + auxiliary network).
        """
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1.")
        network = self.forward + self.backward
        extra = self.penalty + self.aux_forward + self.aux_backward
        serial = self.data + network
        return serial / (self.data + extra + network / workers)
