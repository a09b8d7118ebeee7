"""The operations of a collective, each by itself, over gloo."""

from __future__ import annotations

import socket
import time
import warnings
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from resist_lightning.comm.collective import SoloCollective
from resist_lightning.comm.group import destroy_group, group_exists, join_group
from resist_lightning.comm.mean import start_mean
from resist_lightning.comm.members import default_collective
from resist_lightning.comm.torch_collective import GroupCollective
from resist_lightning.comm.waiting import check_while_waiting, forget_check, wait_polling
from resist_lightning.errors import WorkerLost
from tests.helpers.processes import run_workers


def verbs(worker):
    collective = default_collective()
    assert isinstance(collective, GroupCollective)
    assert (collective.worker, collective.workers) == (worker, dist.get_world_size())

    numbers = collective.gather_numbers([worker, 2.0**48 - 1])
    mean = torch.tensor([1.0, 10.0 * worker])
    start_mean(collective, mean, "shared")()
    largest = torch.tensor([worker, -worker])
    start_mean(collective, largest, "shared")()
    flags = torch.tensor([worker == 1, False])
    start_mean(collective, flags, "shared")()
    first = torch.tensor([7 * worker + 5])
    collective.broadcast_(first, "start")
    sent = dict(collective.sent_bytes)
    texts = collective.gather_bytes(b"\x00\xff" * worker)
    assert collective.sent_bytes["control"] - sent["control"] == 2 * (8 + 4)
    before = collective.sent_bytes["control"]
    assert collective.gather_bytes(b"") == [b""] * collective.workers
    assert collective.sent_bytes["control"] - before == 2 * 8
    return numbers, mean.tolist(), largest.tolist(), flags.tolist(), first.item(), sent, texts


def test_the_verbs_and_what_they_count():
    results = run_workers(verbs, 3)
    for worker, (numbers, mean, largest, flags, first, sent, texts) in enumerate(results):
        assert numbers == [[w, 2.0**48 - 1] for w in range(3)]
        assert mean == pytest.approx([1.0, 10.0])
        assert (largest, flags, first) == ([2, 0], [True, False], 5)
        shared = 11 + 22 + 3  # 4/3 of 8, 16 and 2 bytes, rounded up
        assert texts == [b"", b"\x00\xff", b"\x00\xff\x00\xff"]
        assert sent == {"control": 32, "shared": shared, **({"start": 16} if worker == 0 else {})}


def ring(worker):
    """Send two buffers to the right, and one to the left."""
    collective = GroupCollective()
    workers, right, left = collective.workers, (worker + 1) % collective.workers, (worker - 1) % collective.workers
    sends = {right: [torch.full((3,), worker), torch.full((2,), worker / 2)], left: [torch.full((1,), 10 + worker)]}
    receives = {left: [torch.zeros(3, dtype=torch.int64), torch.zeros(2)], right: [torch.zeros(1, dtype=torch.int64)]}
    collective.exchange(sends, receives, {"hand_over": 24, "state": 8, "merge": 8})
    assert receives[left][0].tolist() == [left] * 3
    assert receives[left][1].tolist() == [left / 2] * 2
    assert receives[right][0].tolist() == [10 + right]
    collective.exchange({}, {}, {})
    with pytest.raises(AssertionError):
        collective.exchange({}, {}, {"hand_over": 1})
    return workers, dict(collective.sent_bytes)


def test_messages_of_several_buffers_arrive_in_order():
    assert run_workers(ring, 3) == [(3, {"hand_over": 24, "state": 8, "merge": 8})] * 3


class Unstaged(GroupCollective):
    """Sends tensors without staging and polls, as under NCCL; only gloo's messages cannot be polled."""

    def __init__(self):
        super().__init__()
        self._stage = False

    def _wait(self, works):
        if len(works) == 1:
            super()._wait(works)
        else:  # an exchange
            for work in works:
                work.wait()


def as_under_nccl(worker):
    collective = Unstaged()
    collective.connect()
    rows = collective.gather_numbers([worker, -1.0])
    mean, first = torch.tensor([float(worker)]), torch.tensor([worker + 5])
    start_mean(collective, mean, "shared")()
    collective.broadcast_(first, "start")
    assert collective.gather_bytes(b"ab"[:worker]) == [b"", b"a"]
    with pytest.raises(ValueError, match="posted early need gloo"):
        collective.start_receive(first, 1 - worker, tag=0)
    return rows, mean.item(), first.item(), dict(collective.sent_bytes)


def test_operations_that_are_polled_and_the_greeting_of_all_pairs():
    expected = ([[0, -1], [1, -1]], 0.5, 5)
    for worker, (*found, sent) in enumerate(run_workers(as_under_nccl, 2)):
        assert tuple(found) == expected
        assert sent == {"control": 16 + 8 + 1, "shared": 4, "start": 1 if worker else 1 + 8}


def wait_for_a_late_worker(worker):
    """Worker 1 is late once, and then does not come at all."""
    began = time.monotonic()

    def check():
        if time.monotonic() - began > 0.1:
            raise WorkerLost("worker 1 is lost")

    time.sleep(0.4 * worker)
    flat = torch.ones(2)
    work = dist.all_reduce(flat, async_op=True)
    if worker == 0:
        check_while_waiting(check)
        with pytest.raises(WorkerLost, match="worker 1 is lost"):
            wait_polling([work])
        forget_check(check)
    wait_polling([work])
    assert flat.tolist() == [2.0, 2.0]
    if worker == 0:
        with pytest.raises(RuntimeError, match=r"(?i)time(d )? ?out"):
            wait_polling([dist.all_reduce(flat, async_op=True)])
    time.sleep(1.0 * worker)


def test_a_worker_that_waits_raises_what_a_check_finds_and_what_the_operation_does():
    run_workers(wait_for_a_late_worker, 2, collective_timeout=0.8)


def alone(worker):
    kinds = [type(default_collective()) is SoloCollective, group_exists()]
    destroy_group()
    return [*kinds, group_exists(), type(default_collective()) is SoloCollective]


def test_a_group_of_one_is_no_group():
    assert run_workers(alone, 1) == [[True, True, False, True]]
    assert not group_exists()
    assert isinstance(default_collective(), SoloCollective)


def warned_of_detail(worker):
    """Torch's error came from the first sync of three workers, and blamed them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        default_collective(warn=True)
        dist.set_debug_level(dist.DebugLevel.DETAIL)
        default_collective(warn=True)
    return [str(warning.message).split(" ", 1)[0] for warning in caught]


def test_a_debug_level_that_would_end_the_run_is_named_once():
    assert run_workers(warned_of_detail, 2) == [["TORCH_DISTRIBUTED_DEBUG=DETAIL"], []]


def rejoin(worker, port):
    """Join groups one after another; worker 0 is late each time, so at first only its old address can be found."""
    workers = dist.get_world_size()
    destroy_group()
    sums = []
    for group in range(3):
        time.sleep(0 if worker else 0.3)
        join_group(
            "gloo", address="127.0.0.1", port=port, worker=worker, workers=workers, timeout=timedelta(seconds=20)
        )
        sums.append(sum(row[0] for row in default_collective().gather_numbers([worker + group])))
        if group < 2:
            dist.barrier()
            destroy_group()
    return sums


def test_a_quick_worker_does_not_find_the_group_before():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_workers(rejoin, 2, port) == [[1, 3, 5]] * 2


def default_backends(worker, ports):
    """Groups as in a plain loop: without a backend, as torch recommends, or with one for each kind of device."""
    workers, found = dist.get_world_size(), []
    for port, backend in zip(ports, (None, "cpu:gloo", "cpu:gloo,cuda:gloo"), strict=True):
        destroy_group()
        dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=worker, world_size=workers)
        for collective in (default_collective(), default_collective(torch.device("cpu"))):
            flat = torch.tensor([float(worker)])
            start_mean(collective, flat, "shared")()
            found.append((collective.gather_numbers([worker]), flat.item()))
    return found


def test_a_group_without_a_backend_and_one_with_several():
    with ExitStack() as open_at_once:
        listeners = [open_at_once.enter_context(socket.socket()) for _ in range(3)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in listeners]
    assert run_workers(default_backends, 2, ports) == [[([[0], [1]], 0.5)] * 6] * 2
