"""Ends the rounds of a run: by a sync for which the training waits, or by start and end of one in the background."""

from __future__ import annotations

from typing import Any

from resist_lightning.checks.handshake import Handshake
from resist_lightning.checks.header import Purpose
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.replicas import Replicas
from resist_lightning.engine.evaluation import Observation
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.sync import Plan
from resist_lightning.schedule.progress import Activity, Clock, StepTimer
from resist_lightning.state.timing import Seconds, now


class RoundEnd:
    """Takes a worker from one round to the next. Every method but :meth:`begin_round` is collective.

    Args:
        layout: the model's parts and the settings.
        clock: the position in the run.
        sync: the method's sync.
        handshake: compares values that the workers must agree on.
        observation: is told when a round begins.
        replicas: the members of this worker.
        activity: shows others this worker's activity.
        seconds: adds up the seconds that this worker spends in syncs.

    Attributes:
        step_seconds: each worker's mean seconds per local step in the last round; empty in the first one.
    """

    def __init__(
        self,
        layout: Layout,
        clock: Clock,
        sync: Any,
        handshake: Handshake,
        observation: Observation,
        replicas: Replicas,
        activity: Activity,
        seconds: Seconds,
    ) -> None:
        self._layout = layout
        self._clock = clock
        self._sync = sync
        self._collective: Collective = sync.exchange.collective
        self._handshake = handshake
        self._observation = observation
        self._replicas = replicas
        self._activity = activity
        self._seconds = seconds
        self._exchanging = Seconds(sync.exchange.device)
        self._step_timer = StepTimer(activity)
        self.step_seconds: list[float] = []

    def sync_if_due(self) -> bool:
        """Sync if the round is complete, or begin one that overlaps. Collective then: every worker must call this.

        Returns:
            Whether a new round has begun.
        """
        if self._clock.overlap > 0 and self._clock.at_border and not self._sync.under_way:
            with self._seconds.timed("sync"):
                self._begin_sync()
        # The blocks of a sync in the background, whose shared layers are in transit already.
        if self._sync.blocks_must_leave(self._clock.round, self._clock.steps_left):
            self._sync.send_blocks(self._clock.round)
        if not self._clock.due:
            return False
        with self._seconds.timed("sync"):
            if self._sync.under_way:
                self._apply_sync()
            else:
                self._run_sync()
        return True

    def _run_sync(self) -> None:
        """Sync, and begin the next round. Collective: every worker must call this."""
        ended, plan = self._meet()
        # Without the handshake, in which the workers wait for the slowest one.
        with self._exchanging.timed("sync"):
            self._activity.begin("averaging")
            finish_average = self._sync.start_average(plan)
            # Before the clock moves on: the activity of a sync names the round that ends.
            self._activity.begin("hand_over")
            self._next_round()
            # Blocks are packed and sent while the average of the shared tensors is under way.
            self._sync.hand_over(plan, ended)
            finish_average()
        # The tensors that the sync covers are equal now, which the next handshake verifies by these hashes.
        self._handshake.divergence.note(self._sync.replicated_tensors(self._clock.round), self._clock.round)
        self.begin_round()
        self._activity.begin("local steps")

    def _begin_sync(self) -> None:
        """Begin the sync of this round in the background. Collective: every worker must call this."""
        ended, plan = self._meet()
        self._sync.start_overlapped(plan, ended)
        self._activity.begin("local steps")

    def _apply_sync(self) -> None:
        """Begin the next round with the result of :meth:`_begin_sync`; waits for it if it must. Sends nothing more."""
        self._activity.begin("averaging")
        self._sync.wait_overlapped()
        self._layout.tensors.keep()  # as the handshake does, before a sync for which the training waits
        self._next_round()
        agreed = self._sync.apply_overlapped(self._clock.round)
        # Each worker has learned something else meanwhile; the values that arrived must be equal, and are compared.
        self._handshake.divergence.note(agreed, self._clock.round)
        self.begin_round()
        self._activity.begin("local steps")

    def begin_round(self) -> None:
        """Note the state at the beginning of the round. Sends nothing."""
        self._sync.begin_round(self._clock.round)
        self._observation.begin_round()

    def _meet(self) -> tuple[int, Plan]:
        """The handshake before a sync, which compares the workers; returns the round that ends, and the plan."""
        self._replicas.end_steps()
        now(self._sync.exchange.device)  # the seconds of local steps are the GPU's; the handshake waits for it anyway
        self._activity.begin("handshake")
        measured = [self._step_timer.take(), self._exchanging.take_sync()]
        reports = self._handshake.run(Purpose.SYNC, self._clock, measured)
        ended = self._clock.round
        # Before `learn`: the plan must not depend on the newest measurements.
        plan: Plan = self._sync.plan(ended, self._handshake.divergence.left_out)
        by_worker = self._collective.by_worker(reports)
        # The times of the slowest members.
        slowest = [[max(column) for column in zip(*rows, strict=True)] for rows in by_worker]
        self.step_seconds, sync_seconds = ([row[place] for row in slowest] for place in (0, 1))
        self._layout.learn(ended, self.step_seconds, sync_seconds)
        return ended, plan

    def _next_round(self) -> None:
        # Before optimizers restart, which may move the learning rate that the handshake has compared.
        ended = self._clock.round
        self._clock.next_round()
        if self._layout.config.momentum == "reset":
            self._sync.restart_states(ended)
