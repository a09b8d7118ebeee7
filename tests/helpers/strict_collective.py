"""Workers as threads that communicate by NCCL's rules, to find without a GPU what NCCL would refuse, mix up or hang in.

gloo is more permissive than NCCL. Here, as with NCCL:

- a tensor on another device than the worker's, with gaps, or of an unknown data type is refused;
- a worker's operations in a group are executed in the order in which they were posted, one after the other; the
  messages of one exchange are one operation, and run at once;
- tags are ignored: of the messages between two workers the first sent is the first received, whatever their tags;
- a send completes when it is received, not before;
- the memory of an operation may be neither read nor written from when it is posted until it was waited for; here a
  write is an error, there it is a race.

In a deadlock all workers raise, with the operation in which each of them waits, instead of waiting.

``StrictCollective`` uses it for workers of one process. For those of several members the package's own
``MemberCollective`` runs on it: ``tests.helpers.strict_groups`` puts it in the place of torch.distributed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.comm.collective import Collective, Finish, Meanwhile, Messages, do_nothing
from tests.helpers.threads import SECONDS, call_in_threads

KNOWN = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
}
"""Data types that NCCL sends; booleans as bytes."""


class RuleBroken(AssertionError):
    """An operation that NCCL would refuse, or execute with wrong results."""


class Deadlock(RuleBroken):
    """A state in which NCCL would wait until its timeout."""


@dataclass(eq=False)
class Operation:
    """An operation that a worker has posted.

    Args:
        worker: the worker's rank.
        what: its kind, e.g. ``all_reduce``, equal on all workers; ``exchange`` for messages.
        inputs: of a collective.
        outputs: of a collective.
        sends: messages, in order, with their targets.
        receives: messages, in order, with their sources.
        group: ranks of the workers that take part; empty for all.
        root: position of a broadcast's source in the group.
    """

    worker: int
    what: str
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    sends: list[tuple[int, Tensor]] = field(default_factory=list)
    receives: list[tuple[int, Tensor]] = field(default_factory=list)
    group: tuple[int, ...] = ()
    root: int = 0
    done: bool = False
    awaited: bool = False

    def __post_init__(self) -> None:
        messages = [tensor for _, tensor in [*self.sends, *self.receives]]
        self.memory = [*self.inputs, *self.outputs, *messages]
        where = f" in {self.group}" if self.group else ""
        root = f" from {self.root}" if self.root else ""
        self.signature = f"{self.what}{root}{where} {[_describe(tensor) for tensor in self.inputs]}"
        self._bits: list[Tensor] = []

    def note(self) -> None:
        """Remember the contents of the memory."""
        self._bits = [_bits(tensor) for tensor in self.memory]

    def check(self) -> None:
        """Raise if somebody has written into the memory."""
        for tensor, bits in zip(self.memory, self._bits, strict=True):
            if not torch.equal(_bits(tensor), bits):
                raise RuleBroken(
                    f"worker {self.worker} wrote into {_describe(tensor)} of {self} while it was under way"
                )

    def __str__(self) -> str:
        if self.what != "exchange":
            return self.signature
        sends = [f"send to {peer} {_describe(tensor)}" for peer, tensor in self.sends]
        return " + ".join([*(f"receive from {peer} {_describe(t)}" for peer, t in self.receives), *sends]) or "nothing"


class Network:
    """The connections between the workers of a test.

    Attributes:
        log: posted operations: worker, and operation in words.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.log: list[tuple[int, str]] = []
        self._all = tuple(range(workers))
        # By group and rank in it: operations of different groups do not wait for one another.
        self._queues: dict[tuple[int, ...], dict[int, deque[Operation]]] = {}
        self._changed = threading.Condition()
        self._waiting: dict[int, Operation] = {}
        self._ended: set[int] = set()
        self._error: RuleBroken | None = None
        self._beside: Network | None = None

    def beside(self) -> Network:
        """More connections between the same workers, whose operations do not wait for these."""
        with self._changed:
            if self._beside is None:
                self._beside = Network(self.workers)
                self._beside.log = self.log
            return self._beside

    def post(self, operation: Operation) -> None:
        """Begin an operation, queued after the earlier ones of its worker."""
        with self._changed:
            self._raise_if_broken()
            operation.note()
            self.log.append((operation.worker, str(operation)))
            self._queue(operation).append(operation)
            self._advance()

    def wait(self, operation: Operation) -> None:
        """Wait until an operation was executed."""
        with self._changed:
            self._waiting[operation.worker] = operation
            self._look_for_deadlock()
            while not operation.done and self._error is None:
                if not self._changed.wait(SECONDS):
                    self._fail(Deadlock(f"nothing has happened for {SECONDS} s"))
            del self._waiting[operation.worker]
            self._raise_if_broken()
            if not operation.awaited:
                operation.awaited = True
                operation.check()

    def end(self, worker: int, error: BaseException | None) -> None:
        """Note that a worker posts nothing more."""
        if self._beside is not None:
            self._beside.end(worker, error)
        with self._changed:
            self._ended.add(worker)
            if error is not None:
                self._fail(RuleBroken(f"worker {worker} raised {error!r}"))
            for queues in self._queues.values():
                if error is None and queues.get(worker):
                    self._fail(Deadlock(f"worker {worker} has ended, and nobody takes part in its {queues[worker][0]}"))
            self._look_for_deadlock()

    def _advance(self) -> None:
        """Execute all operations that are ready."""
        for queues in self._queues.values():
            while self._all_together(queues) or self._messages(queues):
                self._changed.notify_all()

    def _queue(self, operation: Operation) -> deque[Operation]:
        """The queue of an operation's worker in its group."""
        group = operation.group or self._all
        return self._queues.setdefault(group, {rank: deque() for rank in group})[operation.worker]

    def _all_together(self, queues: Mapping[int, deque[Operation]]) -> bool:
        """Execute a collective that all workers of a group have reached; returns whether there was one."""
        heads = [queue[0] for queue in queues.values() if queue and queue[0].what != "exchange"]
        if len(heads) < len(queues):
            return False
        if len({head.signature for head in heads}) > 1:
            self._fail(RuleBroken(f"the workers mix up their operations: {'; '.join(map(str, heads))}"))
            return False
        for head in heads:
            head.check()
        _execute(heads)
        for queue in queues.values():
            _finish(queue.popleft())
        return True

    def _messages(self, queues: Mapping[int, deque[Operation]]) -> bool:
        """Deliver the messages that both ends have reached; returns whether there were any."""
        moved = False
        heads = {rank: queue[0] for rank, queue in queues.items() if queue and queue[0].what == "exchange"}
        for worker, head in heads.items():
            while (pair := self._next_pair(worker, head, heads)) is not None:
                (target, sent), (source, received) = pair
                if (sent.dtype, sent.shape) != (received.dtype, received.shape):
                    described = f"{_describe(sent)} from worker {source} meets {_describe(received)} of worker {target}"
                    self._fail(RuleBroken(described))
                    return False
                head.check()
                received.copy_(sent)
                heads[target].note()
                head.sends.remove(pair[0])
                heads[target].receives.remove(pair[1])
                moved = True
        for head in heads.values():
            if not head.sends and not head.receives:
                _finish(queues[head.worker].popleft())
                moved = True
        return moved

    def _next_pair(
        self, worker: int, head: Operation, heads: Mapping[int, Operation]
    ) -> tuple[tuple[int, Tensor], tuple[int, Tensor]] | None:
        """The next send of a worker whose receiver is ready, and the matching receive."""
        tried: set[int] = set()
        for send in head.sends:
            target = send[0]
            if target in tried or target not in heads:
                continue
            tried.add(target)
            for receive in heads[target].receives:
                if receive[0] == worker:
                    return send, receive
        return None

    def _look_for_deadlock(self) -> None:
        blocked = {worker for worker, operation in self._waiting.items() if not operation.done}
        if blocked and len(blocked | self._ended) == self.workers:
            # The first operation in its queue, which may be an earlier one than that for which it waits.
            heads = {worker: self._queue(self._waiting[worker])[0] for worker in sorted(blocked)}
            stand = [f"worker {worker} waits in {head}" for worker, head in heads.items()]
            stand += [f"worker {worker} has ended" for worker in sorted(self._ended)]
            self._fail(Deadlock("; ".join(stand)))

    def _fail(self, error: RuleBroken) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise type(self._error)(str(self._error))


class StrictCollective(Collective):
    """A worker in a network.

    Args:
        network: its network.
        worker: its number.
        device: the only one whose tensors it sends; by default the CPU.
    """

    def __init__(self, network: Network, worker: int, device: torch.device | None = None) -> None:
        super().__init__(worker, network.workers)
        self._network = network
        self._device = device or torch.device("cpu")

    def beside(self) -> Collective:
        other = StrictCollective(self._network.beside(), self.worker, self._device)
        other.sent_bytes = self.sent_bytes
        return other

    def connect(self) -> None:
        peers = [worker for worker in range(self.workers) if worker != self.worker]
        greetings = {peer: [torch.zeros(1, dtype=torch.uint8)] for peer in peers}
        self.exchange(greetings, {peer: [torch.zeros(1, dtype=torch.uint8)] for peer in peers}, {"start": len(peers)})

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return self._gather(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gather_bytes(self, text: bytes) -> list[bytes]:
        lengths = [int(length) for (length,) in self.gather_numbers([len(text)])]
        if not max(lengths):
            return [b""] * self.workers
        rows = self._gather(torch.tensor(list(text.ljust(max(lengths), b"\0")), dtype=torch.uint8))
        return [bytes(row.tolist())[:length] for row, length in zip(rows, lengths, strict=True)]

    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        finish = self._begin(Operation(self.worker, "all_reduce", inputs=[flat]))
        self.sent_bytes[kind] += all_reduce_bytes(flat.nbytes, self.workers)

        def finished() -> Tensor:
            finish()
            return flat

        return finished

    def broadcast_(self, flat: Tensor, kind: str) -> None:
        self._begin(Operation(self.worker, "broadcast", inputs=[flat]))()
        if self.worker == 0:
            self.sent_bytes[kind] += flat.nbytes * (self.workers - 1)

    def exchange(
        self, sends: Messages, receives: Messages, kinds: Mapping[str, int], meanwhile: Meanwhile = do_nothing
    ) -> None:
        outgoing = [(peer, flat) for peer, flats in sorted(sends.items()) for flat in flats]
        incoming = [(peer, flat) for peer, flats in sorted(receives.items()) for flat in flats]
        assert sum(kinds.values()) == sum(flat.nbytes for _, flat in outgoing)
        finish: Finish = do_nothing
        if outgoing or incoming:
            finish = self._begin(Operation(self.worker, "exchange", sends=outgoing, receives=incoming))
        meanwhile()
        finish()
        self.sent_bytes.update(kinds)

    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        self.sent_bytes[kind] += flat.nbytes
        return self._begin(Operation(self.worker, "exchange", sends=[(target, flat)]))

    def start_receive(self, flat: Tensor, source: int, tag: int) -> Finish:
        return self._begin(Operation(self.worker, "exchange", receives=[(source, flat)]))

    def _gather(self, mine: Tensor) -> Tensor:
        gathered = torch.empty((self.workers, *mine.shape), dtype=mine.dtype)
        self._begin(Operation(self.worker, "all_gather", inputs=[mine], outputs=[gathered]))()
        self.sent_bytes["control"] += mine.nbytes * (self.workers - 1)
        return gathered

    def _begin(self, operation: Operation) -> Finish:
        post_checked(self._network, operation, self._device)
        return lambda: self._network.wait(operation)


def post_checked(network: Network, operation: Operation, device: torch.device) -> None:
    """Post an operation, unless NCCL would refuse its tensors."""
    for tensor in operation.memory:
        if tensor.device != device:
            raise RuleBroken(f"expected a tensor on {device}, but found {_describe(tensor)}")
        if not tensor.is_contiguous() or tensor.dtype not in KNOWN:
            raise RuleBroken(f"{_describe(tensor)}, strides {tensor.stride()}, cannot be sent")
    network.post(operation)


def run_strictly(target: Callable[..., Any], workers: int, *args: Any) -> tuple[list[Any], Network]:
    """Call ``target(collective, *args)`` for each worker; returns the values in order, and the network."""
    return run_on_network(lambda network, worker: target(StrictCollective(network, worker), *args), workers)


def run_on_network(target: Callable[[Network, int], Any], workers: int) -> tuple[list[Any], Network]:
    """Call ``target(network, worker)`` for each worker; returns the values in order, and the network."""
    network = Network(workers)

    def work(worker: int) -> Any:
        try:
            value = target(network, worker)
        except BaseException as error:
            network.end(worker, error)
            raise
        network.end(worker, None)
        return value

    values = call_in_threads(work, workers, consequences=RuleBroken)
    network._raise_if_broken()
    return values, network


def _execute(operations: Sequence[Operation]) -> None:
    """Execute a collective, whose workers have all posted it."""
    inputs = [operation.inputs[0] for operation in operations]
    if operations[0].what == "all_gather":
        for operation in operations:
            operation.outputs[0].copy_(torch.stack(inputs))
        return
    if operations[0].what == "broadcast":
        result = inputs[operations[0].root].clone()
    else:
        stacked = torch.stack(inputs)
        result = stacked.sum(0) if stacked.is_floating_point() else stacked.max(0).values
    for tensor in inputs:
        tensor.detach().copy_(result)


def _finish(operation: Operation) -> None:
    operation.note()
    operation.done = True


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8).clone()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}] on {tensor.device}"
