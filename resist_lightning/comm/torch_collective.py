"""The `Collective` over torch.distributed's default group; every byte is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.comm.collective import Collective, Finish, Messages, SoloCollective
from resist_lightning.comm.group import check_backend, group_exists


class GroupCollective(Collective):
    """The workers of torch.distributed's default group. Creates no group of its own.

    Args:
        device: of the tensors that will be sent; by default the CPU where gloo serves it, else the current GPU.

    Raises:
        ValueError: if the group cannot send tensors of ``device`` by gloo or NCCL.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(worker=dist.get_rank(), workers=dist.get_world_size())
        # E.g. "cpu:gloo,cuda:nccl".
        pairs = dist.get_backend_config().split(",")
        backends = dict(pair.split(":") for pair in pairs)
        if device is None:
            device = torch.device("cpu" if backends.get("cpu") == "gloo" else "cuda")
        backend = backends.get(device.type, backends.get("cpu"))
        check_backend(backend, device, backends)
        # Gloo serves GPUs in some operations only, so with it everything goes through the CPU.
        self._stage = backend == "gloo"
        self._device = torch.device("cpu") if self._stage else device

    @override
    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        # As float64, which has room for counters and for digests of 48 bits.
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return [row.tolist() for row in self._gather(mine)]

    @override
    def gather_bytes(self, text: bytes) -> list[bytes]:
        lengths = [int(length) for (length,) in self.gather_numbers([len(text)])]
        # An all-gather needs one size on all workers.
        padded = text.ljust(max(lengths), b"\0")
        if not padded:
            return [b""] * self.workers
        mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(self._device)
        texts = []
        for row, length in zip(self._gather(mine), lengths, strict=True):
            texts.append(row.cpu().numpy().tobytes()[:length])
        return texts

    @override
    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        operation = dist.ReduceOp.SUM if flat.is_floating_point() else dist.ReduceOp.MAX
        wire = self._to_wire(flat)
        work = dist.all_reduce(wire, op=operation, async_op=True)
        self.sent_bytes[kind] += all_reduce_bytes(flat.nbytes, self.workers)

        def finish() -> Tensor:
            work.wait()
            return wire

        return finish

    @override
    def broadcast_(self, flat: Tensor, kind: str) -> None:
        wire = self._to_wire(flat)
        dist.broadcast(wire, src=0)
        self._from_wire(wire, flat)
        if self.worker == 0:
            self.sent_bytes[kind] += flat.nbytes * (self.workers - 1)

    @override
    def exchange(self, sends: Messages, receives: Messages, kinds: Mapping[str, int]) -> None:
        operations = []
        landings: list[tuple[Tensor, Tensor]] = []
        # Every receive is posted before any send: with the sends first, two gloo workers take turns on the link and
        # an exchange takes twice as long (docs/decisions/0004-receives-first.md).
        for peer, flats in sorted(receives.items()):
            for tag, flat in enumerate(flats):
                landing = self._landing(flat)
                landings.append((landing, flat))
                operations.append(dist.P2POp(dist.irecv, landing, peer, tag=tag))
        sent = 0
        for peer, flats in sorted(sends.items()):
            for tag, flat in enumerate(flats):
                sent += flat.nbytes
                operations.append(dist.P2POp(dist.isend, self._to_wire(flat), peer, tag=tag))
        assert sum(kinds.values()) == sent
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for landing, flat in landings:
            self._from_wire(landing, flat)
        self.sent_bytes.update(kinds)

    @override
    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        self._refuse_nccl()
        wire = self._to_wire(flat.contiguous())
        work = dist.isend(wire, target, tag=tag)
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
        work = dist.irecv(landing, source, tag=tag)
        assert work is not None

        def finish() -> None:
            work.wait()
            self._from_wire(landing, flat)

        return finish

    def _gather(self, mine: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(mine) for _ in range(self.workers)]
        dist.all_gather(gathered, mine)
        self.sent_bytes["control"] += mine.nbytes * (self.workers - 1)
        return gathered

    def _refuse_nccl(self) -> None:
        """NCCL executes what is posted in order, so receives that are posted early would block the sends behind."""
        if not self._stage:
            raise ValueError(
                f"messages that are posted early need gloo, and this group has {dist.get_backend()!r}. Choose "
                "process_group_backend='gloo'; tensors on GPUs are sent through the host."
            )

    def _to_wire(self, flat: Tensor) -> Tensor:
        return flat.cpu() if self._stage else flat

    def _landing(self, flat: Tensor) -> Tensor:
        return torch.empty_like(flat, device="cpu") if self._stage else flat

    def _from_wire(self, wire: Tensor, flat: Tensor) -> None:
        if wire is not flat:
            flat.copy_(wire)


def default_collective(device: torch.device | None = None) -> Collective:
    """The workers of torch.distributed's default group, or one alone where there is none or it has one member."""
    if group_exists() and dist.get_world_size() > 1:
        return GroupCollective(device)
    return SoloCollective()


def gather_tensor(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Tensors of all workers, stacked. Collective: every worker must call this, in the same order."""
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    return torch.stack(gathered)
