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
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.checks.handshake import Handshake, Host
from resist_lightning.checks.header import Purpose
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.members import default_collective
from resist_lightning.comm.replicas import Replicas
from resist_lightning.engine.evaluation import Observation
from resist_lightning.engine.optimizer_steps import StepWatch
from resist_lightning.engine.registry import check_arguments, detach_hooks, make_layout, make_sync
from resist_lightning.engine.resume import Resumption
from resist_lightning.engine.round_end import RoundEnd
from resist_lightning.methods.config import CommonConfig
from resist_lightning.schedule.progress import Activity, Clock
from resist_lightning.state.optimizer_state import OptimizerStates, first_rate
from resist_lightning.state.timing import Seconds
from resist_lightning.state.unmade import initialise, present_device
from resist_lightning.state.weight_swaps import SwappingOptimizers


class Engine:
    """Trains this worker's part of a network in rounds: residual blocks, neurons, a stage, or all of it.

    Args:
        module: the user's module, complete and on its device; or, except for its buffers, on the meta device: then it
            gets memory for this worker's parts, and worker 0 makes the values (``reset_parameters`` of each part).
        optimizers: its optimizers, built on the complete module.
        config: the settings of the run.
        collective: the workers; by default those of torch.distributed's default group, or one alone.
        forward_context: a context in which recorded inputs are replayed, e.g. autocast.
        host: the surrounding framework, which may compare settings and stop all workers together.
        total_steps: local steps of the run, where the settings need them (``finish_rounds``, ``growth``).
        device: device for a module that is on the meta device.

    Raises:
        ValueError: if settings, module or optimizers do not fit the method.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        config: CommonConfig,
        *,
        collective: Collective | None = None,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        host: Host | None = None,
        total_steps: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_arguments(optimizers, config)
        self.module, self.config = module, (config := config.for_optimizers(optimizers))
        self._device = present_device(module, device)
        self.collective = collective or default_collective(self._device, warn=True)
        self.layout = make_layout(module, config, self.collective.workers, optimizers, members=self.collective.members)
        self.running, self._observed_kind = False, ""
        self.ended_on_first = False  # with the full model on worker 0 alone
        self.states = OptimizerStates(optimizers, self._device)
        self.clock = Clock.by(config.local_steps, lambda: first_rate(optimizers), self.layout.overlapped_steps)
        self.steps = StepWatch(self.layout, self.states, self.clock)
        self.activity = Activity(self.clock)
        self._handshake = Handshake(self.layout, self.collective, host or Host(), self.states.mean_rate)
        self.losses = self._handshake.divergence.losses
        self.seconds = Seconds(self._device)
        self.sync: Any = make_sync(self.layout, self.states, self.collective, self._device)  # by method
        self.observation = Observation(self.layout, self.sync, self._handshake, self._device, forward_context)
        self.resumption = Resumption(self.layout, self.clock, self.states, self.sync, self.observation, total_steps)
        self.replicas = Replicas(module, self.collective, partial=self.layout.partial)
        watched = (self._handshake, self.observation, self.replicas, self.activity, self.seconds)
        self._round_end = RoundEnd(self.layout, self.clock, self.sync, *watched)
        self.swaps = SwappingOptimizers(optimizers, self._on_own_weights, alone=config.first_evaluates)
        self.sent_bytes_by_worker: dict[str, list[int]] = {}
        self._resume_state: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    @property
    def step_seconds(self) -> list[float]:
        """Each worker's mean seconds per local step in the last round; empty in the first one."""
        return self._round_end.step_seconds

    @property
    def partition(self) -> Any:
        """The partition of this round."""
        return self.layout.partition(self.clock.round)

    @property
    def observing(self) -> bool:
        """Whether the module is the full model."""
        return self.observation.active

    @property
    def incomplete(self) -> bool:
        """Whether the training has ended, and this worker has only a part."""
        return self.ended_on_first and self.collective.worker > 0

    def prepare(self, example: Tensor) -> None:
        """Show the method an input batch of the network; AuxNet needs it before :meth:`start`.

        Collective: every worker must call this, in the same order.
        """
        self.layout.prepare(example.to(self._device), self.collective)

    def start(self) -> bool:
        """Begin with worker 0's weights, or resume from the state of :meth:`restore`; hold this worker's part only.

        Collective: every worker must call this, in the same order.

        Returns:
            Whether every worker resumes with its own tensors.

        Raises:
            WorkersDisagree: if the workers' code, models or settings differ.
        """
        if self.activity.what != "starting":
            more = "to train on, make a new Engine, and restore() the checkpoint_state() of this one"
            raise RuntimeError(f"start() is called once, before the first local step; {more}.")
        if self.collective.worker == 0:
            initialise(self.module, self._device)
        detach_hooks(self.module)  # it may have been a full model
        self.resumption.begin_round()
        reports = self._handshake.start(self.clock, self.states, self.resumption.numbers())
        exact, complete = self.resumption.agree(reports)
        if not complete:
            self.sync.distribute_weights(self.clock.round)
        self.collective.connect()
        self.sync.connect()
        self.sync.exchange.masks = self._handshake.divergence.begin()
        self.observation.start()
        self.sync.keep_own_parts(self.clock.round)
        # A file has the tensors of this worker's part, and the notes from the beginning of the round refer to them.
        self.resumption.load_tensors()
        self._round_end.begin_round()
        self.resumption.load_rest()
        self.running = True
        self.steps.begin()
        self.activity.begin("local steps")
        return exact

    def after_step(self) -> None:
        """Count a local step, and sync if the round is complete. Call it after ``optimizer.step()``.

        Collective at the end of a round: every worker must call this equally often.
        """
        self.count_step()
        self.sync_if_due()

    def count_step(self) -> None:
        """Count a local step without syncing, for loops in which a sync must wait for the end of the batch."""
        if not self.running:
            raise RuntimeError("the engine is not running: call start() before the first local step.")
        if self.observing:
            raise RuntimeError("a local step cannot be taken on the full model; leave `full_model()` first.")
        self.sync.end_step()
        self.steps.note_local_step()
        self.clock.tick()
        self.activity.begin("local steps")

    def sync_if_due(self) -> bool:
        """Sync if the round is complete, or begin one that overlaps. Collective then: every worker must call this.

        Returns:
            Whether a new round has begun.
        """
        return self._round_end.sync_if_due()

    @contextmanager
    def full_model(self, kind: str = "evaluation") -> Iterator[nn.Module]:
        """Inside, the module is the full model, as if the round ended here; training then continues unchanged.

        With ``evaluate_on="first"`` this holds on worker 0; on the others the module stays their part.

        Collective: every worker must enter and leave it, in the same order.

        Args:
            kind: name under which the bytes are counted: ``evaluation`` or ``checkpoint``.
        """
        if self.observing:  # inside another one
            yield self.module
            return
        # An evaluation may draw random numbers, and the training must not notice.
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            self.begin_observation(kind)
            try:
                yield self.module
            finally:
                self.end_observation()

    def begin_observation(self, kind: str = "evaluation") -> None:
        """Assemble the full model; see :meth:`full_model`. Collective: every worker must call this."""
        purpose = Purpose.CHECKPOINT if kind == "checkpoint" else Purpose.EVALUATION
        self.activity.begin("saving" if kind == "checkpoint" else "evaluation")
        # Tensors that are made in inference mode could never train again.
        with torch.inference_mode(False), self.seconds.timed("observe"):
            self._assemble(purpose, kind, keep=True)
        self._observed_kind = kind
        self.swaps.catch()

    def end_observation(self) -> None:
        """Return to this worker's part, bit for bit; writes to buffers stay. Sends nothing."""
        self.swaps.release()
        with torch.inference_mode(False), self.seconds.timed("observe"):
            self.observation.put_back(self.clock.round)
        self.activity.begin("local steps")

    def finish(self) -> None:
        """End the training: the module becomes the full model, ready to use or save, on every worker or the first.

        Collective: every worker must call this, in the same order.
        """
        self.activity.begin("finishing")
        self.steps.warn_of_one_round()
        with torch.inference_mode(False), self.seconds.timed("observe"):
            self._assemble(Purpose.FINISH, "evaluation", keep=False)
            self._resume_state = self.checkpoint_state()  # while the observation still knows the scaled tensors
            self.ended_on_first = self.config.first_ends and self.layout.workers > 1
            self.observation.settle()
            self.abandon()
        self.summary = self.sync.summary()
        self.sent_bytes_by_worker = self.collective.gather_sent_bytes()
        self.activity.begin("ended")

    def abandon(self) -> None:
        """Stop without sending anything, after an error. Absent blocks stay absent, and reading them raises."""
        self.steps.end()
        self.replicas.end()
        self.swaps.release()
        self.observation.end()
        self.sync.end()
        self.running = False

    def checkpoint_state(self) -> dict[str, Any]:
        """State for resuming from a checkpoint of the full model, beside its ``state_dict``.

        Numbers, strings, lists and tensors only; empty before the training starts. In the training it is called inside
        :meth:`full_model`.
        """
        if not self.observing:
            if self.running:
                raise RuntimeError("checkpoint_state() goes with the full model: call it inside `full_model()`.")
            return self._resume_state
        return {**self.resumption.place(), **self.observation.full_state()}

    def restore(self, state: dict[str, Any], own: dict[str, Any] | None = None) -> bool:
        """Resume from a checkpoint whose ``state_dict`` the module has loaded; call it before :meth:`start`.

        Args:
            state: from :meth:`checkpoint_state`; other workers or settings begin a new partition.
            own: this worker's ``resumption.state_dict()``; the resume is exact if every worker has its own.

        Returns:
            Whether the partition is the one that the checkpoint was made with.
        """
        if self.running:
            raise RuntimeError("the engine is running: call restore() before start().")
        return self.resumption.restore(state, own)

    def meet(self) -> None:
        """Check that all workers are at the same step, before a message of the host's that could pair with a sync.

        Collective: every worker must call this, in the same order. Raises WorkersDisagree.
        """
        self.sync.wait_overlapped()
        self._handshake.run(Purpose.HOST, self.clock)

    def _on_own_weights(self, act: Callable[[], Any]) -> None:
        """Call ``act`` while the module holds this worker's part, although it is being observed."""
        self.end_observation()
        act()
        self.begin_observation(self._observed_kind)

    def _assemble(self, purpose: Purpose, kind: str, *, keep: bool) -> None:
        if not self.running:
            raise RuntimeError("the engine is not running: call start() first.")
        self.steps.check_counted(finished=not keep)
        self.replicas.end_steps()
        # The sync under way is applied when it is due, even if the full model is assembled before.
        self.sync.wait_overlapped()
        self.observation.assemble(purpose, self.clock, kind, keep=keep)
