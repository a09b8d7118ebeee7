"""How workers meet: every sync begins with a header that all must agree on."""

from __future__ import annotations

from collections.abc import Sequence

from resist_lightning.collective import Collective
from resist_lightning.headers import Header, Purpose, check_headers, header_numbers, read_header
from resist_lightning.layout import Layout
from resist_lightning.rounds import Clock

_EXTRA_NUMBERS = 2


class Host:
    """What surrounds the engine; numbers that it wants compared or agreed upon travel in the header of each sync."""

    def stop_flag(self) -> int:
        """Whether this worker was asked to stop; all workers must say the same."""
        return 0

    def report(self) -> list[float]:
        """Numbers to tell the other workers."""
        return []

    def learn(self, reports: list[list[float]]) -> None:
        """Receive the numbers of all workers."""


class Meeting:
    """Compares headers before any weight is sent.

    Args:
        layout: the model's parts; workers with different ones must not mix.
        collective: the workers.
        host: what surrounds the engine.
    """

    def __init__(self, layout: Layout, collective: Collective, host: Host) -> None:
        self._layout = layout
        self._collective = collective
        self._host = host

    def hold(self, purpose: Purpose, clock: Clock, extra: Sequence[float] = ()) -> list[list[float]]:
        """Meet the other workers.

        Collective: every worker must call this, in the same order.

        Args:
            purpose: why the workers meet.
            clock: where this worker is.
            extra: at most two numbers to tell the others.

        Returns:
            The extra numbers of every worker.

        Raises:
            WorkersDisagree: if the workers are in different states.
        """
        header = Header(purpose, clock.round, clock.step, self._host.stop_flag(), self._layout.digest())
        mine = header_numbers(header)
        extra = [*extra, *[0.0] * (_EXTRA_NUMBERS - len(extra))]  # one size for every purpose, so that any two can meet
        received = self._collective.gather_numbers([*mine, *extra, *self._host.report()])
        check_headers([read_header(numbers) for numbers in received])
        end = len(mine) + len(extra)
        self._host.learn([numbers[end:] for numbers in received])
        return [numbers[len(mine) : end] for numbers in received]
