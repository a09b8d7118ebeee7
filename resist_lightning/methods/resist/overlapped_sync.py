"""The sync of ResIST beside the training: from copies, applied some local steps later.

::

    step of the round   0 ........ border ........ blocks leave ...... end
    training            the partition of this round                    the next one
    beside it                      average         merge, hand over
    copies                         shared layers   blocks
    applied                                                            weight + (value - own copy), or what arrives

(docs/decisions/0043-overlap.md, 0061-blocks-leave-last.md)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.background import Background
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.compressed_mean import CompressedMean
from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.payload import Payload
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.sync import BlockSync
from resist_lightning.methods.resist.transit import Transit
from resist_lightning.schedule.transfers import SyncPlan
from resist_lightning.state.optimizer_state import OptimizerStates

_LEAVING_SECONDS = 10.0  # in which a sync under way ends by itself, unless a worker is lost


@dataclass(frozen=True)
class _SharedDeparture:
    """The average of all workers beside the training, as decided at the border; tensors are the module's.

    Args:
        plan: the plan of the sync.
        compressed: tensors that are averaged in fewer bits.
        exact: tensors that are averaged as they are.
        stepping: averaged tensors that take a step of the outer optimizer.
        unit_vectors: averaged tensors that must have the length 1 afterwards.
    """

    plan: SyncPlan
    compressed: Sequence[Tensor]
    exact: Sequence[Tensor]
    stepping: Sequence[Tensor]
    unit_vectors: Sequence[Tensor]


@dataclass(frozen=True)
class _BlockDeparture:
    """The merge and hand-over of blocks beside the training, as decided when the blocks leave.

    Args:
        plan: the plan of the sync, with the velocities of the outer optimizer.
        payloads: payload of each block that is sent or received, and of each velocity, numbered behind the blocks.
        stepping: tensors that take a step of the outer optimizer here.
        unit_vectors: tensors that must have the length 1 after they were merged here.
        velocities: absent parameters whose velocity arrives, each with the velocity's stand-in in a payload.
    """

    plan: SyncPlan
    payloads: Mapping[int, Payload]
    stepping: Sequence[Tensor]
    unit_vectors: Sequence[Tensor]
    velocities: Sequence[tuple[Tensor, Tensor]]


class OverlappedSync(BlockSync):
    """A worker's side of the syncs of a run with ``overlap``: begun at the border, applied at the end of the round."""

    def __init__(
        self, layout: BlockLayout, states: OptimizerStates, collective: Collective, device: torch.device
    ) -> None:
        super().__init__(layout, states, collective, device)
        self._beside = self.exchange
        self._transit: Transit | None = None
        self._background: Background | None = None
        self._changing_at_border: set[str] = set()

    @property
    @override
    def under_way(self) -> bool:
        return self._transit is not None

    @override
    def connect(self) -> None:
        # Otherwise a message of the host's or of a metric could pair with one that is sent beside the training.
        collective = self.exchange.collective.beside()
        collective.connect()
        self._beside = Exchange(collective, self._device, self._quantizer and self._quantizer.for_values)
        if self._quantizer is not None:
            self._compressed_mean = CompressedMean(collective, self._quantizer)

    @override
    def start_overlapped(self, plan: SyncPlan, round: int) -> None:
        self.agree_on_branches(round)
        self._changing_at_border = self._changing | self._layout.changing()
        averaged = list(self._averaged(plan).values())
        compressed, exact = self.split_averaged(averaged)
        departure = _SharedDeparture(
            plan=plan,
            compressed=compressed,
            exact=exact,
            stepping=self._stepping(averaged),
            unit_vectors=self._unit_vectors(averaged),
        )
        # A single worker has no other holder of its blocks, which the plan leaves alone.
        arriving = self.replicated_tensors(round + 1) if self._layout.workers > 1 else self._averaged(plan)
        self._transit = transit = Transit(arriving)
        transit.add(averaged)
        self._beside.masks = transit.of(self.exchange.masks)
        # In this order, so that there are never three copies: an average of copies in one buffer needs no other.
        self._beside.put_together([transit.of(exact)])
        transit.keep_own(averaged)
        transit.blocks_left = not plan.owner
        self._background = Background(partial(self._send_shared, departure, transit), self._device)

    @override
    def blocks_must_leave(self, round: int, steps_left: int) -> bool:
        if self._transit is None or self._transit.blocks_left:
            return False
        return steps_left <= self._layout.overlap_of_blocks(self._layout.overlapped_steps(round))

    @override
    def send_blocks(self, round: int) -> None:
        assert self._transit is not None
        transit, plan = self._transit, self.plan(round, ())
        departure = self._depart(plan, round)
        held = departure.payloads.keys() & self._layout.partition(round).held[self._worker]
        copied = [tensor for block in sorted(held) for tensor in departure.payloads[block].tensors]
        copied += departure.stepping
        transit.add(copied)
        transit.keep_own(copied)
        transit.blocks_left = True
        self._background = Background(partial(self._send_blocks, departure, transit, self._background), self._device)

    def _depart(self, plan: SyncPlan, round: int) -> _BlockDeparture:
        """Decide everything that could change while the training goes on: parameters may be frozen."""
        owned: list[int] = []
        if self._outer is not None:
            owned = self._owned_blocks(plan)
            plan = self.with_velocities(plan, round)
        transfers = (*plan.merge, *plan.hand_over)
        mine = {each.block for each in transfers if self._worker in (each.source, each.target)}
        payloads = {block: self._payloads.of(block, round=round) for block in sorted(mine)}
        merged = self._tensors_of({each.block for each in plan.merge if each.target == self._worker})
        return _BlockDeparture(
            plan=plan,
            payloads=payloads,
            stepping=self._stepping(self._tensors_of(owned)),
            unit_vectors=self._unit_vectors(merged),
            velocities=self._arriving_velocities(payloads),
        )

    def _send_shared(self, departure: _SharedDeparture, transit: Transit) -> None:
        """Average copies. Runs in another thread, as the next function does: neither reads the module's values."""
        left_out, compressed = departure.plan.left_out, departure.compressed
        if self._compressed_mean is not None:
            others = self._layout.fragments.outside(departure.plan.fragment)
            self._compressed_mean.average(compressed, "shared", left_out, transit.of(compressed), others)
        self._beside.average(transit.of(departure.exact), "shared", left_out)
        normalise(transit.of(departure.unit_vectors))
        if self._outer is not None:
            self._outer.step(departure.stepping, transit.of(departure.stepping))

    def _send_blocks(self, departure: _BlockDeparture, transit: Transit, earlier: Background | None) -> None:
        """Merge and hand over copies, behind the average."""
        if earlier is not None:  # else it had ended before a checkpoint
            earlier.wait()
        plan, payloads = departure.plan, departure.payloads

        def payload(block: int) -> Payload:
            found = payloads[block]
            return replace(found, block=transit.of(found.block), compressed=transit.of(found.compressed))

        def make_room() -> None:
            for each in payloads.values():
                transit.make_room(each.tensors, self._device)

        self._beside.merge(plan, payload)
        normalise(transit.of(departure.unit_vectors))
        if self._outer is not None:
            self._outer.step(departure.stepping, transit.of(departure.stepping))
        self._beside.hand_over(plan, payload, make_room)
        if self._outer is not None:
            for tensor, velocity in departure.velocities:
                self._outer.receive_velocity(tensor, transit.pop(velocity))

    @override
    def wait_overlapped(self) -> None:
        if self._background is not None:
            self._background.wait()
            self._background = None

    @override
    def apply_overlapped(self, round: int) -> dict[str, Tensor]:
        self.wait_overlapped()
        assert self._transit is not None
        transit, self._transit = self._transit, None
        stayed = {id(tensor) for tensor in named_tensors(self._layout.module).values() if not tensor.is_meta}
        self.make_room(round)
        transit.apply(stayed)
        self._beside.put_together([])  # forgets the buffer, which goes with the copies
        self._arrived = transit.values()
        return transit.agreed()

    @override
    def begin_round(self, round: int) -> None:
        super().begin_round(round)
        self._arrived = {}
        # Tensors that were frozen after the border have trained until then, on each worker for itself.
        self._changing |= self._changing_at_border

    @override
    def _alike(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        # After an overlapped sync workers differ in the tensors that it did not send, as those frozen at the border.
        return [tensor for tensor in tensors if not self._arrived or id(tensor) in self._arrived]

    @override
    def end(self) -> None:
        if self._background is not None:
            self._background.leave(_LEAVING_SECONDS)
        self._background, self._transit = None, None
        self._beside = self.exchange  # its group shall not live on with this object
        if self._quantizer is not None:
            self._compressed_mean = CompressedMean(self.exchange.collective, self._quantizer)
        super().end()

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        self.wait_overlapped()
        state = super().state_dict(with_full_model=with_full_model)
        if self._transit is not None:
            names = {id(tensor): name for name, tensor in named_tensors(self._layout.module).items()}
            state["transit"] = self._transit.state_dict(names)
            state["changing_at_border"] = sorted(self._changing_at_border)
        return state

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        if "transit" in own:
            self._transit = Transit.load(own["transit"], named_tensors(self._layout.module), self._device)
            self._changing_at_border = set(own["changing_at_border"])

    def _stepping(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that take steps of the outer optimizer."""
        return self._outer.stepping(tensors) if self._outer is not None else []

    def _tensors_of(self, blocks: Iterable[int]) -> list[Tensor]:
        return [tensor for block in blocks for tensor in self._layout.blocks[block].tensors().values()]

    def _arriving_velocities(self, payloads: Mapping[int, Payload]) -> list[tuple[Tensor, Tensor]]:
        """Parameters of blocks whose velocity comes to this worker before the block is in the module, and stand-ins."""
        first = len(self._layout.blocks)
        pairs: list[tuple[Tensor, Tensor]] = []
        for number in filter(lambda number: number >= first, payloads):
            payload = payloads[number]
            plain, compressed = self._payloads.split_velocities(self._tensors_of([number - first]))
            pairs += zip(plain, payload.block, strict=True)
            pairs += zip(compressed, payload.compressed, strict=True)
        return [(tensor, velocity) for tensor, velocity in pairs if velocity.is_meta]

    def _unit_vectors(self, averaged: list[Tensor]) -> list[Tensor]:
        """The tensors whose mean must be brought to length 1."""
        if self._layout.workers == 1:
            return []
        among = set(map(id, averaged))
        return [vector for vector in unit_vectors(self._layout.module).values() if id(vector) in among]


def make_block_sync(
    layout: BlockLayout, states: OptimizerStates, collective: Collective, device: torch.device
) -> BlockSync:
    """The sync of the settings: one for which the training waits, or one beside it."""
    kind: Callable[..., BlockSync] = OverlappedSync if layout.config.overlap else BlockSync
    return kind(layout, states, collective, device)
