"""The interface of a sync: how a method averages and hands over tensors between two rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.quantize import Quantizer
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.part_guard import PartGuard
from resist_lightning.state.absent import ENDED_EARLY
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.unmade import allocate


class Plan(Protocol):
    """A plan of a sync, made before anything is sent; each method has its own."""

    @property
    def left_out(self) -> tuple[int, ...]:
        """Workers whose values do not count in means."""


AnyPlan = TypeVar("AnyPlan", bound=Plan)
AnyLayout = TypeVar("AnyLayout", bound=Layout)


class SyncAbilities:
    """Optional abilities of a sync: without effect, or not implemented, until a method overrides them."""

    incomplete = ENDED_EARLY
    """The reason why a module that is incomplete when the training has ended stays so."""

    def end_step(self) -> None:
        """Called after each local step."""

    def connect(self) -> None:
        """Connect the workers for messages beside the training; called once, when it starts.

        Collective: every worker must call this, in the same order.
        """

    def lacks(self, own: Mapping[str, Any]) -> bool:
        """Whether this worker, to resume from its own :meth:`Sync.state_dict`, also needs tensors of worker 0."""
        return False

    @property
    def under_way(self) -> bool:
        """Whether a sync has begun beside the training that is not applied yet; the same on all workers."""
        return False

    def start_overlapped(self, plan: Any, round: int) -> None:
        """Begin the sync at the end of ``round`` beside the training, from copies of this worker's present tensors.

        Collective: every worker must call this, in the same order. Only where the settings overlap syncs.
        """
        raise NotImplementedError(f"{type(self).__name__} begins no sync beside the training.")

    def blocks_must_leave(self, round: int, steps_left: int) -> bool:
        """Whether the hand-over of the sync of ``round``, which is under way, must begin now.

        Args:
            round: the round.
            steps_left: local steps until it is complete.
        """
        return False

    def send_blocks(self, round: int) -> None:
        """Begin the hand-over beside the training, from copies made now, behind the average that is under way.

        Collective: every worker must call this, in the same order.
        """
        raise NotImplementedError(f"{type(self).__name__} begins no sync beside the training.")

    def wait_overlapped(self) -> None:
        """Wait until everything in transit has arrived, without applying it. Sends nothing more.

        Raises:
            Exception: any error of the sync beside the training.
        """

    def apply_overlapped(self, round: int) -> dict[str, Tensor]:
        """Wait for the sync under way, hold the parts of ``round``, which begins, and apply the values that arrived.

        Returns:
            By name, the values that the sync made equal on all workers, before each adds its progress since.
        """
        raise NotImplementedError(f"{type(self).__name__} begins no sync beside the training.")

    def writes_to_assemble(self, plan: Any) -> bool:
        """Whether :meth:`Sync.assemble` on worker 0 alone writes into the tensors of workers that keep their part."""
        return False

    def metrics(self) -> dict[str, float]:
        """Numbers to log about the round that ended, by name; the same on all workers."""
        return {}

    def summary(self) -> dict[str, Any]:
        """The method's report on the whole run, as plain data; the same on all workers.

        Collective: every worker must call this, in the same order.
        """
        return {}


class Sync(SyncAbilities, ABC, Generic[AnyLayout, AnyPlan]):
    """Base class: plans a sync, averages, hands over, assembles the full model, and holds this worker's parts.

    Args:
        layout: the model's parts and the settings.
        states: the optimizers' state.
        collective: the workers.
        device: device of present tensors.
        quantizer: compresses the messages of the exchange; None if nothing is compressed.

    Attributes:
        exchange: sends and receives.
        part_guard: refuses to use a module of which this worker has only a part.
    """

    def __init__(
        self,
        layout: AnyLayout,
        states: OptimizerStates,
        collective: Collective,
        device: torch.device,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.part_guard = PartGuard(collective.worker)
        self.exchange = Exchange(collective, device, quantizer and quantizer.for_values, layout.module)
        self._layout = layout
        self._states = states
        self._device = device
        self._worker = collective.worker
        self._quantizer = quantizer
        self._changing: set[str] = set()
        self._as_received: list[tuple[Tensor, Tensor]] = []

    def distribute_weights(self, round: int) -> None:
        """Give every worker its parts for ``round`` of worker 0's module; called once, before :meth:`keep_own_parts`.

        Collective: every worker must call this, in the same order.
        """
        tensors = named_tensors(self._layout.module)
        allocate(tensors, self._device)
        self.exchange.broadcast(list(tensors.values()), "start")

    def keep_own_parts(self, round: int) -> None:
        """Keep only this worker's parts for ``round``; called once, when training starts. Sends nothing.

        Shared tensors move into common memory, so that averaging them needs no copy.
        """
        self.make_room(round)
        allocate(self._layout.shared, self._device)
        if self._quantizer is None and self._layout.workers > 1:
            self.exchange.put_together([tensors.values() for tensors in self._averaged_together()])

    def end(self) -> None:
        """Release everything; called once, when training has ended. Every tensor gets memory of its own again."""
        self.exchange.take_apart()
        self.part_guard.end(self.incomplete)
        self._as_received = []

    @property
    def unsettled(self) -> set[str]:
        """Names of tensors that no longer change, and that may differ between workers until their next sync."""
        return self._changing - self._layout.changing()

    def begin_round(self, round: int) -> None:
        """Note the tensors that training can change from now on, and copy those that leaving a worker out restores."""
        self._changing = self._layout.changing()
        self._as_received = []  # before the new copies, so that there are never two at once
        if self._layout.config.non_finite == "drop":
            self._as_received = [(tensor, tensor.detach().clone()) for tensor in self.owned_tensors()]

    @abstractmethod
    def plan(self, round: int, left_out: tuple[int, ...]) -> AnyPlan:
        """Plan the sync between ``round`` and the next."""

    def plan_full_model(self, round: int, left_out: tuple[int, ...]) -> AnyPlan:
        """Plan a sync of the whole model at the end of ``round``."""
        return self.plan(round, left_out)

    def restart_states(self, round: int) -> None:
        """Restart the optimizer state of the parameters that the sync at the end of ``round`` covers."""
        self._states.reset()

    def start_average(self, plan: AnyPlan) -> Finish:
        """Begin to replace tensors that all workers hold, before and after the sync, by their mean over the workers.

        Collective: every worker must call this, in the same order.

        Returns:
            A function that waits for it. The hand-over may come first: its packing then overlaps with the average.
        """
        self._leave_out(plan)
        if self._worker in plan.left_out:
            self._states.reset()  # it may have NaN or infinity too
        return self._start_average(list(self._averaged(plan).values()), plan)

    @abstractmethod
    def hand_over(self, plan: AnyPlan, round: int) -> None:
        """Bring the parts that are not averaged to their holders of the next round.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.

        Args:
            plan: the plan of the sync.
            round: the round that ends.
        """

    @abstractmethod
    def assemble(self, plan: AnyPlan, kind: str, *, unequal: bool, at_first: bool) -> None:
        """Make the module the full model on every worker, or on worker 0 alone, as if the round ended here.

        Collective: every worker must call this, in the same order.

        Args:
            plan: the plan of the sync that would come next.
            kind: name under which the bytes are counted.
            unequal: whether replicas may have diverged since the last sync.
            at_first: whether worker 0 alone gets it; the others send it the missing parts, and keep theirs as they are.
                Afterwards, a worker that the plan leaves out may have its values from the beginning of the round.
        """

    @abstractmethod
    def make_room(self, round: int) -> None:
        """Free the parts of others in ``round``, and allocate missing ones for the caller to fill. Sends nothing."""

    def replicated_tensors(self, round: int) -> dict[str, Tensor]:
        """By name, the tensors that the sync into ``round`` makes equal on all workers."""
        return self._may_change(self._layout.shared)

    @abstractmethod
    def owned_tensors(self) -> list[Tensor]:
        """The tensors that this worker holds now, and not all others."""

    def gradients(self) -> dict[str, Tensor]:
        """By name, the gradients that this worker's parameters have in training."""
        named = self._layout.module.named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        """This worker's notes of the round, for :meth:`load_state_dict`.

        Args:
            with_full_model: whether the full model is saved beside it.
        """
        copies = {id(tensor): copy for tensor, copy in self._as_received}
        received = {}
        for name, tensor in named_tensors(self._layout.module).items():
            if id(tensor) in copies:
                received[name] = copies[id(tensor)].cpu()
        # "before" is filled by methods that compress; files of all methods have the same keys.
        return {"changing": sorted(self._changing), "before": {}, "received": received}

    def load_state_dict(self, own: dict[str, Any]) -> None:
        """Resume in the middle of a round, after :meth:`begin_round`."""
        self._changing = set(own["changing"])
        tensors = named_tensors(self._layout.module)
        received = {id(tensors[name]): copy for name, copy in own["received"].items()}
        for tensor, copy in self._as_received:
            copy.copy_(received.get(id(tensor), copy))

    def _averaged_together(self) -> list[dict[str, Tensor]]:
        """For each message of an average, its tensors by name."""
        return [self._may_change(self._layout.shared)]

    def _averaged(self, plan: AnyPlan) -> dict[str, Tensor]:
        """By name, the tensors that a sync averages over all workers."""
        return self._may_change(self._layout.shared)

    def _start_average(self, tensors: list[Tensor], plan: AnyPlan) -> Finish:
        return self.exchange.start_average(tensors, "shared", plan.left_out)

    def _leave_out(self, plan: AnyPlan) -> None:
        """If the plan leaves this worker out, reset its owned tensors to their values when the round began."""
        if self._worker in plan.left_out:
            for tensor, copy in self._as_received:
                tensor.detach().copy_(copy)

    def _may_change(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the tensors that cannot have changed in this round."""
        # Frozen since the round began, or unfrozen in it: workers may differ in either.
        names = self._changing | self._layout.changing()
        return {name: tensor for name, tensor in tensors.items() if name in names}
