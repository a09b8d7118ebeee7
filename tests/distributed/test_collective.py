"""The verbs that talk, each by itself, over gloo."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from resist_lightning.comm.collective import SoloCollective
from resist_lightning.comm.group import destroy_group, group_exists, join_group
from resist_lightning.comm.mean import start_mean
from resist_lightning.comm.torch_collective import GroupCollective, default_collective
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
    """Two buffers to the right, one to the left."""
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


def alone(worker):
    kinds = [type(default_collective()) is SoloCollective, group_exists()]
    destroy_group()
    return [*kinds, group_exists(), type(default_collective()) is SoloCollective]


def test_a_group_of_one_is_no_group():
    assert run_workers(alone, 1) == [[True, True, False, True]]
    assert not group_exists()
    assert isinstance(default_collective(), SoloCollective)


def rejoin(worker, port):
    """Groups one after the other; worker 0 comes late each time, so that its last address is all there is to find."""
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
    """A group as a plain loop makes it: without a backend, as torch recommends, or with one for each kind of device."""
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
