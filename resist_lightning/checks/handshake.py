"""The handshake: every sync begins with a header that all workers must agree on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence

from resist_lightning.checks.divergence import DivergenceChecks
from resist_lightning.checks.environment import fingerprint_of
from resist_lightning.checks.fingerprint import Fingerprint, differences, digest
from resist_lightning.checks.header import Header, Purpose, check_headers, header_numbers, read_header
from resist_lightning.comm.collective import Collective
from resist_lightning.errors import WorkersDisagree, process_name
from resist_lightning.methods.layout import Layout
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.optimizer_state import OptimizerStates

_EXTRA_NUMBERS = 2


class Host:
    """The engine's callbacks into its surroundings; their numbers travel in the header of each sync."""

    def settings(self) -> dict[str, str]:
        """Settings of its own that all workers must share, by name; compared once, at the start."""
        return {}

    def stop_flag(self) -> int:
        """Whether this worker was asked to stop; all workers must say the same."""
        return 0

    def report(self) -> list[float]:
        """Numbers to tell the other workers; equally many on all."""
        return []

    def on_reports(self, reports: list[list[float]]) -> None:
        """Receive the numbers of all workers; at every handshake."""

    def agree(self, reports: list[list[float]]) -> None:
        """Receive them at a sync, to change settings of the next local steps equally on all workers."""


class Handshake:
    """Compares headers before any weight is sent; ``rate`` gives this worker's learning rate now.

    Attributes:
        divergence: the checks whose numbers travel with the headers.
    """

    def __init__(
        self, layout: Layout, collective: Collective, host: Host, rate: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._layout = layout
        self._collective = collective
        self._host = host
        self._rate = rate
        self._rates_differed = False
        self._rate_rose = False
        self.divergence = DivergenceChecks(layout, collective)

    def start(self, clock: Clock, states: OptimizerStates, extra: Sequence[float] = ()) -> list[list[float]]:
        """Run the first handshake, before anything is trained; ``extra`` are at most two numbers for the others.

        Collective: every worker must call this, in the same order.

        Returns:
            The extra numbers of every process, by rank.

        Raises:
            WorkersDisagree: naming the differences in code, versions, settings, optimizers or models.
        """
        fingerprint = fingerprint_of(self._layout, states, self._host.settings())
        return self.run(Purpose.START, clock, extra, fingerprint=fingerprint)

    def run(
        self, purpose: Purpose, clock: Clock, extra: Sequence[float] = (), *, fingerprint: Fingerprint | None = None
    ) -> list[list[float]]:
        """Run a handshake with the other workers.

        Collective: every worker must call this, in the same order.

        Args:
            purpose: of the handshake.
            clock: this worker's round and local step.
            extra: at most two numbers to tell the others.
            fingerprint: compared instead of the layout's digest, at the start.

        Returns:
            The extra numbers of every process, by rank.

        Raises:
            WorkersDisagree: if the workers are in different states, or the last sync left them unequal tensors.
            NotFinite: if weights are to be averaged and a worker has NaN or infinity, unless it is left out for that.
        """
        # An observation has done it before, as its code may exchange weights on purpose.
        if purpose in (Purpose.START, Purpose.SYNC):
            self._layout.tensors.keep()
        layout = self._layout.digest() if fingerprint is None else digest(fingerprint)
        # The length of the next round is compared here, before it begins: later no handshake would do it.
        # A host's message may be the one by which workers agree to stop, as LearningRateFinder's is.
        stop = 0 if purpose is Purpose.HOST else self._host.stop_flag()
        state = Header(purpose, clock.round, clock.step, stop, layout, clock.agreed_steps)
        header = header_numbers(state)
        checks = self.divergence.numbers(purpose)
        # One size for every purpose, so that workers that come with different ones can compare their headers.
        padding = [0.0] * (_EXTRA_NUMBERS - len(extra))
        own = [*header, *checks, *extra, *padding, self._rate(), *self._host.report()]
        rows = self._collective.gather_numbers(own)
        headers = [read_header(row) for row in rows]
        # Before the headers: their comparison would only say that two digests differ, not which setting does.
        if fingerprint is not None and {other.purpose for other in headers} == {Purpose.START}:
            self._compare([other.layout for other in headers], fingerprint)
        check_headers(headers, self._collective.members)

        end_of_checks = len(header) + len(checks)
        self.divergence.judge([row[len(header) : end_of_checks] for row in rows], clock)
        rate = end_of_checks + _EXTRA_NUMBERS
        reports = [row[rate + 1 :] for row in rows]
        self._host.on_reports(reports)
        # Only at a sync, where all workers change settings of the next round at the same step.
        if purpose == Purpose.SYNC:
            self._compare_rates([row[rate] for row in rows])
            self._warn_of_rising_rate(clock)
            self._host.agree(reports)
        return [row[end_of_checks:rate] for row in rows]

    def _compare_rates(self, rates: Sequence[float]) -> None:
        """Warn once of learning rates that differ, which is legal, but seldom meant."""
        if len(set(rates)) == 1 or self._rates_differed:
            return
        self._rates_differed = True
        if self._collective.rank == 0:
            members = self._collective.members
            values = ", ".join(f"{process_name(rank, members)} {rate:g}" for rank, rate in enumerate(rates))
            warnings.warn(
                f"the workers train at different learning rates (mean over all parameter groups: {values}). A schedule "
                "depends on a number that differs between workers: log the metric of ReduceLROnPlateau with "
                "sync_dist=True, or step the schedule by epochs.",
                stacklevel=4,
            )

    def _warn_of_rising_rate(self, clock: Clock) -> None:
        """Warn once of a round that its rule has made too long."""
        if not clock.rate_rose or self._rate_rose:
            return
        self._rate_rose = True
        if self._collective.rank == 0:
            warnings.warn(
                f"local_steps={clock.rule} gave round {clock.round} {clock.local_steps} local steps for the learning "
                "rate at its beginning, which has risen since. For a schedule with warm-up, set warmup_steps.",
                stacklevel=4,
            )

    def _compare(self, digests: Sequence[int], fingerprint: Fingerprint) -> None:
        """Raise if digests differ, naming the differences."""
        if len(set(digests)) == 1:
            return
        # Only now: fingerprints are long, and on a healthy start nobody needs them.
        texts = self._collective.gather_bytes(json.dumps(fingerprint).encode())
        found = differences([json.loads(text) for text in texts], self._collective.members)
        raise WorkersDisagree(
            "workers were started differently:\n  " + "\n  ".join(found) + "\nNo weights were mixed. Start all "
            "workers with the same code, packages and settings."
        )
