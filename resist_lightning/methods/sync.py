"""What a worker sends at a sync, and what it makes of what arrives: what the methods have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.mean import CompressedMean
from resist_lightning.comm.quantize import compressible, make_quantizer
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.part_guard import PartGuard
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.timing import Seconds


class Plan(Protocol):
    """What is decided of a sync before anything is sent."""

    @property
    def left_out(self) -> tuple[int, ...]:
        """Workers whose values no mean has in it."""


AnyPlan = TypeVar("AnyPlan", bound=Plan)
AnyLayout = TypeVar("AnyLayout", bound=Layout)


class Sync(ABC, Generic[AnyLayout, AnyPlan]):
    """A worker's side of the syncs of a run; what it holds follows the rounds.

    Args:
        layout: the model's parts and the settings.
        states: the optimizers' state.
        collective: the workers.
        device: where present tensors live.
        seconds: where the time of the parts is added up.
    """

    def __init__(
        self, layout: AnyLayout, states: OptimizerStates, collective: Collective, device: torch.device, seconds: Seconds
    ) -> None:
        wire = make_quantizer(layout.wire)
        self.guard = PartGuard(collective.worker)
        self.exchange = Exchange(collective, device, wire, layout.module)
        self._layout = layout
        self._states = states
        self._worker = collective.worker
        self._seconds = seconds
        self._compressed_mean = CompressedMean(collective, wire) if wire is not None else None
        self._changing: set[str] = set()
        self._as_received: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Call it once, when training starts: shared tensors move together. Sends nothing."""
        if self._compressed_mean is None and self._layout.workers > 1:
            self.exchange.put_together(self._may_change(self._layout.shared).values())

    def end(self) -> None:
        """Call it once, when training has ended: every tensor gets memory of its own again."""
        self.exchange.take_apart()
        self.guard.end()
        self._as_received = []

    def end_step(self) -> None:
        """Called after each local step."""

    def metrics(self) -> dict[str, float]:
        """What a method has to log of the round that ended, by name; the same on all workers."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What a method has to say of the whole run, as plain data; the same on all workers.

        Collective: every worker must call this, in the same order.
        """
        return {}

    def begin_round(self, round: int) -> None:
        """Note what training can change now, and, where it will be needed, what it was."""
        self._changing = self._layout.changing()
        if self._compressed_mean is not None:
            self._compressed_mean.begin(filter(compressible, self.replicated_tensors(round).values()))
        self._as_received = []  # never two copies at once
        if self._layout.config.non_finite == "drop":
            self._as_received = [(tensor, tensor.detach().clone()) for tensor in self.owned_tensors()]

    def leave_out(self, plan: AnyPlan) -> None:
        """Where the plan leaves this worker out: what it alone holds is again what it was when the round began."""
        if self._worker in plan.left_out:
            for tensor, copy in self._as_received:
                tensor.detach().copy_(copy)

    def gradients(self) -> dict[str, Tensor]:
        """By name, the gradients that this worker's parameters have in training."""
        named = self._layout.module.named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        """What this worker has noted of the round, for :meth:`load_state_dict`.

        Args:
            with_full_model: whether the full model is saved beside it.
        """
        before = (
            {name: self._compressed_mean.before(tensor) for name, tensor in self._named().items()}
            if self._compressed_mean
            else {}
        )
        received = {id(tensor): copy for tensor, copy in self._as_received}
        return {
            "changing": sorted(self._changing),
            "before": {name: tensor.cpu() for name, tensor in before.items() if tensor is not None},
            "received": {name: received[id(t)].cpu() for name, t in self._named().items() if id(t) in received},
        }

    def load_state_dict(self, own: dict[str, Any]) -> None:
        """Go on in the middle of a round, after :meth:`begin_round`."""
        self._changing = set(own["changing"])
        tensors = self._named()
        received = {id(tensors[name]): copy for name, copy in own["received"].items()}
        for tensor, copy in self._as_received:
            copy.copy_(received.get(id(tensor), copy))
        if self._compressed_mean is not None:
            for name, before in own["before"].items():
                remembered = self._compressed_mean.before(tensors[name])
                assert remembered is not None
                remembered.copy_(before)

    def start_average(self, plan: AnyPlan) -> Finish:
        """Begin to make what all workers hold, before and after, the mean over the workers.

        Collective: every worker must call this, in the same order.

        Returns:
            A function that waits for it; the rest may be handed over before, so that packing costs no time of the link.
        """
        tensors = list(self.averaged(plan).values())
        self.leave_out(plan)
        if self._worker in plan.left_out:
            self._states.reset()
        with self._seconds.timed("averaging"):
            if self._compressed_mean is not None:
                known = [tensor for tensor in tensors if compressible(tensor) and self._compressed_mean.known(tensor)]
                taken = set(map(id, known))
                self._compressed_mean.average(known, "shared", plan.left_out)
                tensors = [tensor for tensor in tensors if id(tensor) not in taken]
            finish = self.exchange.start_average(tensors, "shared", plan.left_out)

        def finish_timed() -> None:
            with self._seconds.timed("averaging"):
                finish()

        return finish_timed

    @abstractmethod
    def plan(self, round: int, left_out: tuple[int, ...]) -> AnyPlan:
        """What happens between ``round`` and the next."""

    @abstractmethod
    def averaged(self, plan: AnyPlan) -> dict[str, Tensor]:
        """By name, the tensors that a sync averages over all workers."""

    @abstractmethod
    def replicated_tensors(self, round: int) -> dict[str, Tensor]:
        """By name, what the sync into ``round`` makes equal on all workers."""

    @abstractmethod
    def owned_tensors(self) -> list[Tensor]:
        """What this worker holds now and not all others."""

    @abstractmethod
    def hand_over(self, plan: AnyPlan, round: int) -> None:
        """Bring what is not averaged to its holders of the next round.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.

        Args:
            plan: the plan of the sync.
            round: the round that ends.
        """

    @abstractmethod
    def assemble(self, plan: AnyPlan, kind: str, *, unequal: bool) -> None:
        """Make the module the full model on every worker, as if the round ended here.

        Collective: every worker must call this, in the same order.

        Args:
            plan: the plan of the sync that would come next.
            kind: how the bytes are counted.
            unequal: whether what all workers hold may have parted since the last sync.
        """

    @abstractmethod
    def make_room(self, round: int) -> None:
        """Hold what ``round`` says: free the rest, allocate what is missing for the caller to fill. Sends nothing."""

    def divide(self, round: int) -> None:
        """Keep of the full model, which the module is, what ``round`` says. Sends nothing."""
        self.make_room(round)

    def _may_change(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of some tensors that may have changed in this round."""
        names = self._changing | self._layout.changing()
        return {name: tensor for name, tensor in tensors.items() if name in names}

    def _named(self) -> dict[str, Tensor]:
        module = self._layout.module
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}
