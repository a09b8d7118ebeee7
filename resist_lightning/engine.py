"""The round loop of a worker, free of any framework.

In a plain PyTorch loop::

    engine = Engine(model, [optimizer], Config(local_steps=50))
    engine.start()
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()
        engine.after_step()
    engine.finish()          # now `model` is the full model, on every worker
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from resist_lightning.accounting import KINDS, Sizes
from resist_lightning.collective import Collective, default_collective
from resist_lightning.config import Config
from resist_lightning.exchange import Kinds
from resist_lightning.full_model import FullModel
from resist_lightning.headers import Purpose
from resist_lightning.layout import Layout, parameters_of
from resist_lightning.meeting import Host, Meeting
from resist_lightning.norm import InputRecorder
from resist_lightning.optimizer_state import OptimizerStates
from resist_lightning.partition import Partition
from resist_lightning.plan import SyncPlan, plan_observation, plan_sync
from resist_lightning.presence import Residency
from resist_lightning.rounds import Clock
from resist_lightning.scaling import ScaleHooks
from resist_lightning.sync import Sync
from resist_lightning.timing import Seconds


class Engine:
    """Trains this worker's sub-network, round after round (sections 3 and 4 of the paper).

    Args:
        module: the user's module, complete and on its device.
        optimizers: its optimizers, built on the complete module.
        config: the settings of the run.
        collective: the workers; by default those of torch.distributed's default group, or one alone.
        forward_context: a context in which recorded inputs are replayed, e.g. autocast.
        host: what surrounds the engine.

    Raises:
        ValueError: if settings, module or optimizers do not fit the method.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        config: Config,
        *,
        collective: Collective | None = None,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        host: Host | None = None,
    ) -> None:
        self.module = module
        self.config = config
        self.collective = collective or default_collective()
        self.layout = Layout(module, config, self.collective.workers)
        self.clock = Clock(config.local_steps)
        self.running = False
        self.states = OptimizerStates(optimizers)
        if config.momentum == "travel":
            self.states.check_travel()
        self._meeting = Meeting(self.layout, self.collective, host or Host())
        self._device = next((tensor.device for tensor in self.layout.shared.values()), torch.device("cpu"))
        self.seconds = Seconds(self._device)
        self._sync = Sync(self.layout, self.states, self.collective, self._device, self.seconds)
        self._residency = Residency(self.layout.blocks)
        self._recorder: InputRecorder | None = None
        self._warmup_hooks = ScaleHooks([], 1.0)
        self._writes_at_start = self._writes_unsynced = 0
        self._full = FullModel(self.layout, self._sync.exchange, forward_context)
        self._resume_state: dict[str, Any] = {}
        self.sent_bytes_by_worker: dict[str, list[int]] = {}
        if self.collective.worker == 0:
            self.layout.warn()

    @property
    def partition(self) -> Partition:
        """Who holds what in this round."""
        return self.layout.schedule.partition(self.clock.round)

    @property
    def observing(self) -> bool:
        """Whether the module is the full model now."""
        return self._full.active

    def start(self) -> None:
        """Take worker 0's weights and free the blocks that this worker does not hold.

        Collective: every worker must call this, in the same order.

        Raises:
            WorkersDisagree: if the workers' models or settings differ.
        """
        self._meeting.hold(Purpose.START, self.clock)
        self._sync.exchange.broadcast([*self.module.parameters(), *self.module.buffers()], "start")
        if self.config.batch_norm == "recalibrate" and self.layout.partial:
            self._recorder = InputRecorder(self.module, self.config.recalibration_batches)
        self._make_room(self.partition)
        self._sync.begin()
        self._begin_round()
        self.running = True

    def after_step(self) -> None:
        """Count a local step, and sync if the round is complete. Call it after ``optimizer.step()``.

        Collective at the end of a round: every worker must call this equally often.
        """
        self.count_step()
        self.sync_if_due()

    def count_step(self) -> None:
        """Count a local step without syncing; for loops in which a sync must wait for the end of the batch."""
        if not self.running:
            raise RuntimeError("the engine is not running: call start() before the first local step.")
        if self.observing:
            raise RuntimeError("a local step cannot be taken on the full model; leave `full_model()` first.")
        self.clock.tick()

    def sync_if_due(self) -> None:
        """Sync if the round is complete. Collective at the end of a round: every worker must call this."""
        if self.clock.due:
            with self.seconds.timed("sync"):
                self._end_round()

    @contextmanager
    def full_model(self, kind: str = "evaluation") -> Iterator[nn.Module]:
        """Inside, the module is the full model, as if the round ended here; afterwards training goes on unchanged.

        Collective: every worker must enter and leave it, in the same order.

        Args:
            kind: how the bytes are counted: ``evaluation`` or ``checkpoint``.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.begin_observation(kind)
            try:
                yield self.module
            finally:
                self.end_observation()

    def begin_observation(self, kind: str = "evaluation") -> None:
        """Assemble the full model; see :meth:`full_model`. Collective: every worker must call this."""
        purpose = Purpose.CHECKPOINT if kind == "checkpoint" else Purpose.EVALUATION
        with self.seconds.timed("observe"):
            self._assemble(purpose, kind, keep=True)

    def end_observation(self) -> None:
        """Go back to this worker's sub-network, bit for bit. Sends nothing."""
        with self.seconds.timed("observe"):
            self._full.close()
            self._make_room(self.partition)
            self._full.restore()
            self._writes_at_start = self._writes() - self._writes_unsynced
            self._hook_warmup()

    def finish(self) -> None:
        """End the training: the module becomes the full model on every worker, ready to use or save.

        Collective: every worker must call this, in the same order.
        """
        with self.seconds.timed("observe"):
            self._assemble(Purpose.FINISH, "evaluation", keep=False)
            self._resume_state = self.checkpoint_state()
            self._full.settle()
            self.abandon()
        counts = self.collective.gather_numbers([self.collective.sent_bytes[kind] for kind in KINDS])
        self.sent_bytes_by_worker = {kind: [int(row[i]) for row in counts] for i, kind in enumerate(KINDS)}

    def abandon(self) -> None:
        """Stop without a word to the others; after an error. Absent blocks stay absent, and reading them raises."""
        self._warmup_hooks.remove()
        if self._recorder is not None:
            self._recorder.remove()
        self._sync.end()
        self._recorder, self.running = None, False

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint of the full model needs beside its ``state_dict`` for training to go on.

        Numbers, strings, lists and tensors only; empty before the training starts. Available while the module is the
        full model.
        """
        if not self.observing:
            return self._resume_state
        return {
            "version": 1,
            "workers": self.collective.workers,
            "seed": self.config.seed,
            "round": self.clock.round,
            "step": self.clock.step,
            **self._full.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint whose ``state_dict`` the module has loaded; call it before :meth:`start`.

        Args:
            state: from :meth:`checkpoint_state`; with another number of workers or seed a new partition begins.
        """
        if not state:
            return
        self._full.undo(state)
        self.clock.round, self.clock.step = int(state["round"]), int(state["step"])
        moved = (state["workers"], state["seed"]) != (self.collective.workers, self.config.seed)
        if self.clock.due or (moved and self.clock.step):
            self.clock.next_round()

    def meet(self) -> None:
        """Check that all workers are at the same place, before something else is sent that might pair with a sync.

        Collective: every worker must call this, in the same order.

        Raises:
            WorkersDisagree: if they are not.
        """
        self._meeting.hold(Purpose.HOST, self.clock)

    def sizes(self) -> Sizes:
        """Bytes of the model's parts, for :func:`resist_lightning.accounting.sync_bytes`."""
        return self.layout.sizes(self.states)

    def _end_round(self) -> None:
        self._meeting.hold(Purpose.SYNC, self.clock)
        plan, ended = self._next_plan(), self.clock.round
        finish_average = self._sync.start_average(plan)
        if self.config.momentum == "reset":
            self.states.reset()
        self.clock.next_round()
        self._sync.hand_over(plan, ended, lambda: self._make_room(self.partition))
        finish_average()
        self._begin_round()

    def _assemble(self, purpose: Purpose, kind: str, *, keep: bool) -> None:
        if not self.running:
            raise RuntimeError("the engine is not running: call start() first.")
        calls = list(self._recorder.calls) if self._recorder is not None else []
        still = self._recorder.still if self._recorder is not None else ()
        self._writes_unsynced = self._writes() - self._writes_at_start
        reports = self._meeting.hold(purpose, self.clock, [len(calls), self.clock.step + self._writes_unsynced])
        self._warmup_hooks.remove()
        plan, kinds = plan_observation(self._next_plan(), self.collective.workers), Kinds.all(kind)
        exchange = self._sync.exchange
        if keep:
            held = [tensor for block in self._residency.held() for tensor in block.tensors().values()]
            self._full.remember([*self.layout.shared.values(), *held])
        if any(changes for _, changes in reports):  # otherwise all that several workers hold is equal already
            exchange.average(self._sync.averaged(plan.averaged), kind)
            exchange.merge(plan, self._sync.cargo, kinds)
        exchange.hand_over(plan, self._sync.cargo, kinds, self._residency.hold_all)
        self._full.open(calls if all(recorded for recorded, _ in reports) else [], still, kind)

    def _next_plan(self) -> SyncPlan:
        return plan_sync(self.partition, self.layout.schedule.partition(self.clock.round + 1))

    def _make_room(self, partition: Partition) -> None:
        """Hold what ``partition`` says, and forget the optimizer state of blocks that leave."""
        held = partition.held[self.collective.worker]
        self.states.drop(parameters_of(self._residency.leaving(held)))
        self._residency.hold(held)

    def _begin_round(self) -> None:
        self._sync.begin_round(self.clock.round)
        self._writes_at_start = self._writes()
        self._hook_warmup()

    def _writes(self) -> int:
        """Moves whenever a shared parameter or counter is written to."""
        return sum(tensor._version for tensor in self.layout.shared.values())

    def _hook_warmup(self) -> None:
        self._warmup_hooks.remove()
        if self.layout.schedule.is_warmup(self.clock.round):
            self._warmup_hooks = ScaleHooks(self.layout.blocks, self.layout.scale)
