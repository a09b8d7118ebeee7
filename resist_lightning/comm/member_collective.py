"""The `Collective` of workers that have several members: each byte crosses the link between two workers once.

Member j of a worker sends and receives the j-th part of every buffer; then the members exchange the parts that have
arrived over their fast link. All members must call with equal tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.byte_formulas import all_reduce_bytes, share_of
from resist_lightning.comm.collective import Collective, Finish, Meanwhile, Messages, do_nothing
from resist_lightning.comm.tensors import sendable
from resist_lightning.comm.torch_collective import GroupCollective


@dataclass(frozen=True)
class Members:
    """The process groups of this process in workers of several members.

    Args:
        count: members of each worker.
        inside: the members of this worker, over a fast link.
        between: this member and its counterparts in the other workers, over slow links.
    """

    count: int
    inside: dist.ProcessGroup
    between: dist.ProcessGroup


class MemberCollective(GroupCollective):
    """The workers of torch.distributed's default group, of several members each.

    Args:
        split: the groups of this process.
        device: as for :class:`GroupCollective`.
    """

    def __init__(self, split: Members, device: torch.device | None = None) -> None:
        super().__init__(device, split.count)
        self._inside = split.inside
        self._between = split.between
        first = self.worker * self.members
        self._ranks = range(first, first + self.members)

    @override
    def beside(self) -> Collective:
        raise ValueError(
            "a sync beside the training needs workers of one process each: set devices_per_worker=1, or overlap=0."
        )

    @override
    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        operation = dist.ReduceOp.SUM if flat.is_floating_point() else dist.ReduceOp.MAX
        (wire,) = self._to_wire([flat])
        parts = self._parts(wire)
        mine = parts[self.member]
        work = dist.all_reduce(mine, op=operation, group=self._between, async_op=True) if len(mine) else None
        self._count(kind, all_reduce_bytes(flat.nbytes, self.workers))

        def finish() -> Tensor:
            self._wait([work])
            self._share(parts, kind)
            return wire

        return finish

    @override
    def broadcast_(self, flat: Tensor, kind: str) -> None:
        (wire,) = self._to_wire([flat])
        if self.worker == 0:
            # Before anything was trained its members may differ.
            self._broadcast_inside(wire, kind)
        parts = self._parts(wire)
        mine = parts[self.member]
        if len(mine):
            self._wait([dist.broadcast(mine, src=self.member, group=self._between, async_op=True)])
        if self.worker == 0:
            self._count(kind, flat.nbytes * (self.workers - 1))
        else:
            self._share(parts, kind)
        self._from_wire([wire], [flat])

    @override
    def exchange(
        self, sends: Messages, receives: Messages, kinds: Mapping[str, int], meanwhile: Meanwhile = do_nothing
    ) -> None:
        arriving = {peer: [self._landing(flat) for flat in flats] for peer, flats in sorted(receives.items())}
        # Receives first, as in the base class.
        operations = self._own_parts(dist.irecv, arriving)
        operations += self._own_parts(dist.isend, sends)
        assert sum(kinds.values()) == sum(flat.nbytes for flats in sends.values() for flat in flats)
        begun = dist.batch_isend_irecv(operations) if operations else []
        meanwhile()
        self._wait(begun)
        # All members receive the same messages, so these broadcasts pair.
        for peer, landings in arriving.items():
            for landing, flat in zip(landings, receives[peer], strict=True):
                self._share(self._parts(landing), "arrived")
                self._from_wire([landing], [flat])
        for kind, size in kinds.items():
            self._count(kind, size)

    @override
    def connect(self) -> None:
        if not self._stage:
            self._greet(self.members)  # a byte of each member, so that all pairs connect
            greeting = torch.zeros(1, dtype=torch.uint8, device=self._device)
            for group in (self._inside, self._between):
                self._wait([dist.all_reduce(greeting, group=group, async_op=True)])

    @override
    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        raise ValueError(_ONE_MEMBER)

    @override
    def start_receive(self, flat: Tensor, source: int, tag: int) -> Finish:
        raise ValueError(_ONE_MEMBER)

    @override
    def mean_inside(self, flat: Tensor, kind: str) -> None:
        (wire,) = self._to_wire([flat])
        self._wait([dist.all_reduce(wire, group=self._inside, async_op=True)])
        wire.div_(self.members)
        self._from_wire([wire], [flat])
        self.inside_bytes[kind] += all_reduce_bytes(flat.nbytes, self.members)

    @override
    def broadcast_inside(self, flat: Tensor, kind: str) -> None:
        flats = [sendable(flat)]
        (wire,) = self._to_wire(flats)
        self._broadcast_inside(wire, kind)
        self._from_wire([wire], flats)

    @override
    def gather_inside(self, text: bytes) -> list[bytes]:
        # Not by torch's gather_object: under NCCL it would wait for a lost member for ever.
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device)
        lengths = torch.zeros(self.members, dtype=torch.int64, device=self._device)
        length = torch.tensor([len(text)], device=self._device)
        self._wait([dist.all_gather_into_tensor(lengths, length, group=self._inside, async_op=True)])
        first, *others = self._ranks
        if self.member > 0:
            self._wait(dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, first, group=self._inside)]))
            self.inside_bytes["gathered"] += len(text)
            return []
        flats = [mine.new_empty(size) for size in lengths.tolist()[1:]]
        receives = [
            dist.P2POp(dist.irecv, flat, rank, group=self._inside) for rank, flat in zip(others, flats, strict=True)
        ]
        self._wait(dist.batch_isend_irecv(receives))
        return [text, *(flat.cpu().numpy().tobytes() for flat in flats)]

    @property
    def inside(self) -> dist.ProcessGroup:
        """The group of this worker's members."""
        return self._inside

    def _broadcast_inside(self, wire: Tensor, kind: str) -> None:
        self._wait([dist.broadcast(wire, src=self._ranks[0], group=self._inside, async_op=True)])
        if self.member == 0:
            self.inside_bytes[kind] += wire.nbytes * (self.members - 1)

    def _own_parts(self, operation: Callable[..., Any], messages: Messages) -> list[dist.P2POp]:
        """Operations on this member's part of each message, with its counterpart in the other worker."""
        operations = []
        for peer, flats in sorted(messages.items()):
            partner = peer * self.members + self.member
            # For receives these are the landing buffers themselves, which are on the receiving device already.
            parts = self._to_wire([self._parts(flat)[self.member] for flat in flats])
            operations += [dist.P2POp(operation, part, partner, tag=tag) for tag, part in enumerate(parts) if len(part)]
        return operations

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """A buffer as one view for each member, of nearly equal sizes."""
        ends = [len(flat) * member // self.members for member in range(self.members + 1)]
        return [flat[start:end] for start, end in pairwise(ends)]

    def _share(self, parts: list[Tensor], kind: str) -> None:
        """Send this member's part to the others of its worker, and receive theirs."""
        begun = []
        for rank, part in zip(self._ranks, parts, strict=True):
            if len(part):
                # In place: an all-gather would need parts of one size, and another buffer.
                begun.append(dist.broadcast(part, src=rank, group=self._inside, async_op=True))
        self._wait(begun)
        self.inside_bytes[kind] += parts[self.member].nbytes * (self.members - 1)

    def _count(self, kind: str, worker_bytes: int) -> None:
        """Count this member's share of its worker's bytes; the shares of all members add up to them, exactly."""
        self.sent_bytes[kind] += share_of(worker_bytes, self.member, self.members)


_ONE_MEMBER = "messages that are posted early need workers of one process each: devices_per_worker=1."
