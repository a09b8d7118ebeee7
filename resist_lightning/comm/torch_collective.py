"""The `Collective` over torch.distributed's default group; every byte is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.backends import check_backend
from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.comm.collective import Collective, Finish, Meanwhile, Messages, do_nothing
from resist_lightning.comm.group import bound_device, second_group
from resist_lightning.comm.waiting import Operation, wait_polling


class GroupCollective(Collective):
    """The workers of torch.distributed's default group. Creates no group of its own but for :meth:`beside`.

    Under NCCL the host waits for every operation, and raises if a worker is lost; gloo raises by itself.

    Args:
        device: of the tensors that will be sent; by default the CPU where gloo serves it, else the current GPU.
        members: processes of each worker.
        group: of the same processes in the same order; by default the default group.

    Raises:
        ValueError: if the group cannot send tensors of ``device`` by gloo or NCCL.
    """

    def __init__(
        self, device: torch.device | None = None, members: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        worker, member = divmod(dist.get_rank(), members)
        super().__init__(worker, dist.get_world_size() // members, member, members)
        # E.g. "cpu:gloo,cuda:nccl".
        pairs = dist.get_backend_config().split(",")
        backends = dict(pair.split(":") for pair in pairs)
        if device is None:
            device = torch.device("cpu" if backends.get("cpu") == "gloo" else "cuda")
        backend = backends.get(device.type, backends.get("cpu"))
        check_backend(backend, device, backends, dist.get_rank(), bound_device())
        # Gloo serves GPUs in some operations only, so with it everything goes through the CPU.
        self._stage = backend == "gloo"
        self._device = torch.device("cpu") if self._stage else device
        self._group = group

    @override
    def beside(self) -> Collective:
        other = GroupCollective(self._device, group=second_group())
        # One thread at a time counts bytes of one kind.
        other.sent_bytes = self.sent_bytes
        return other

    @override
    def connect(self) -> None:
        if self._stage:  # gloo has connected all pairs when the group was made
            return
        self._greet(1)

    @override
    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        # As float64, which has room for counters and for digests of 48 bits.
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        rows: list[list[float]] = self._gather(mine).tolist()  # one transfer from a GPU
        return rows

    @override
    def gather_bytes(self, text: bytes) -> list[bytes]:
        lengths = [int(length) for (length,) in self.gather_numbers([len(text)])]
        # An all-gather needs one size on all workers.
        padded = text.ljust(max(lengths), b"\0")
        if not padded:
            return [b""] * self.processes
        mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(self._device)
        texts = []
        for row, length in zip(self._gather(mine).cpu(), lengths, strict=True):
            texts.append(row.numpy().tobytes()[:length])
        return texts

    @override
    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        operation = dist.ReduceOp.SUM if flat.is_floating_point() else dist.ReduceOp.MAX
        (wire,) = self._to_wire([flat])
        work = dist.all_reduce(wire, op=operation, group=self._group, async_op=True)
        self.sent_bytes[kind] += all_reduce_bytes(flat.nbytes, self.workers)

        def finish() -> Tensor:
            self._wait([work])
            return wire

        return finish

    @override
    def broadcast_(self, flat: Tensor, kind: str) -> None:
        (wire,) = self._to_wire([flat])
        self._wait([dist.broadcast(wire, src=0, group=self._group, async_op=True)])
        self._from_wire([wire], [flat])
        if self.worker == 0:
            self.sent_bytes[kind] += flat.nbytes * (self.workers - 1)

    @override
    def exchange(
        self, sends: Messages, receives: Messages, kinds: Mapping[str, int], meanwhile: Meanwhile = do_nothing
    ) -> None:
        operations = []
        landings: list[Tensor] = []
        arriving: list[Tensor] = []
        # Every receive is posted before any send: with the sends first, two gloo workers take turns on the link and
        # an exchange takes twice as long (docs/decisions/0004-receives-first.md).
        for peer, flats in sorted(receives.items()):
            for tag, flat in enumerate(flats):
                landing = self._landing(flat)
                landings.append(landing)
                arriving.append(flat)
                operations.append(dist.P2POp(dist.irecv, landing, peer, self._group, tag))
        # Brought to the host once, where several peers get the same buffer.
        leaving = {id(flat): flat for flats in sends.values() for flat in flats}
        wires = dict(zip(leaving, self._to_wire(list(leaving.values())), strict=True))
        sent = 0
        for peer, flats in sorted(sends.items()):
            for tag, flat in enumerate(flats):
                sent += flat.nbytes
                operations.append(dist.P2POp(dist.isend, wires[id(flat)], peer, self._group, tag))
        assert sum(kinds.values()) == sent
        begun = dist.batch_isend_irecv(operations) if operations else []
        meanwhile()
        self._wait(begun)
        self._from_wire(landings, arriving)
        self.sent_bytes.update(kinds)

    @override
    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        self._refuse_nccl()
        (wire,) = self._to_wire([flat.contiguous()])
        work = dist.isend(wire, target, self._group, tag)
        assert work is not None
        self.sent_bytes[kind] += flat.nbytes

        def finish() -> None:
            work.wait()
            assert wire is not None  # this reference keeps the memory until it is sent

        return finish

    @override
    def start_receive(self, flat: Tensor, source: int, tag: int) -> Finish:
        self._refuse_nccl()
        landing = self._landing(flat)
        work = dist.irecv(landing, source, self._group, tag)
        assert work is not None

        def finish() -> None:
            work.wait()
            self._from_wire([landing], [flat])

        return finish

    def _greet(self, size: int) -> None:
        """Send ``size`` bytes to every other worker. Collective: every worker must call this, in the same order."""
        peers = [worker for worker in range(self.workers) if worker != self.worker]
        greeting = torch.zeros(size, dtype=torch.uint8, device=self._device)
        answers = {peer: [torch.empty_like(greeting)] for peer in peers}
        self.exchange({peer: [greeting] for peer in peers}, answers, {"start": size * len(peers)})

    def _gather(self, mine: Tensor) -> Tensor:
        """The flat tensors of all processes, as rows."""
        gathered = torch.empty(self.processes * len(mine), dtype=mine.dtype, device=mine.device)
        self._wait([dist.all_gather_into_tensor(gathered, mine, group=self._group, async_op=True)])
        self.sent_bytes["control"] += mine.nbytes * (self.processes - self.members)
        self.inside_bytes["control"] += mine.nbytes * (self.members - 1)
        return gathered.view(self.processes, -1)

    def _wait(self, works: Sequence[Operation | None]) -> None:
        begun = [work for work in works if work is not None]  # None: torch's type for a process outside of a group
        if not self._stage:
            wait_polling(begun)
            return
        for work in begun:
            work.wait()

    def _refuse_nccl(self) -> None:
        """Raise under NCCL, which executes operations in order: receives posted early would block the sends behind."""
        if not self._stage:
            raise ValueError(
                f"messages that are posted early need gloo, and this group has {dist.get_backend()!r}. Choose "
                "process_group_backend='gloo'; tensors on GPUs are sent through the host."
            )

    def _to_wire(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the sending device: themselves, or copies on the host."""
        if not self._stage:
            return list(flats)
        wires = []
        on_gpu: set[torch.device] = set()
        for flat in flats:
            if not flat.is_cuda:
                wires.append(flat.cpu())
                continue
            # All copies are started before the first is waited for.
            wires.append(self._landing(flat).copy_(flat, non_blocking=True))
            on_gpu.add(flat.device)
        for device in on_gpu:
            torch.cuda.current_stream(device).synchronize()
        return wires

    def _landing(self, flat: Tensor) -> Tensor:
        """A buffer to receive into: the tensor itself, or one on the host."""
        if not self._stage or flat.is_cpu:
            return flat
        # Pinned memory is copied several times as fast; torch caches it for the next sync.
        return torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda)

    def _from_wire(self, wires: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
        """Copy buffers of :meth:`_to_wire` or :meth:`_landing` back to their tensors, where they are not the same."""
        for wire, flat in zip(wires, flats, strict=True):
            if wire is not flat:
                flat.copy_(wire, non_blocking=True)  # torch does not reuse pinned memory before it has arrived


def gather_tensor(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Tensors of all workers, stacked. Collective: every worker must call this, in the same order."""
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    return torch.stack(gathered)
