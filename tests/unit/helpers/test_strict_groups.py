"""Members of workers with NCCL's rules: their messages, and cases that hang or mix up operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.comm.member_collective import MemberCollective
from tests.helpers.strict_collective import Deadlock, RuleBroken
from tests.helpers.strict_groups import run_members_strictly


def verbs(collective: MemberCollective) -> dict[str, Any]:
    collective.connect()
    total = torch.arange(5.0) + collective.worker
    finish = collective.start_all_reduce(total, "shared")
    peers = [worker for worker in range(collective.workers) if worker != collective.worker]
    found = {peer: [torch.zeros(3)] for peer in peers}
    collective.exchange({peer: [torch.full((3,), 1.0 * peer)] for peer in peers}, found, {"merge": 12 * len(peers)})
    first, inside, mean = (torch.full((3,), 1.0 * collective.rank) for _ in range(3))
    collective.broadcast_(first, "start")
    collective.broadcast_inside(inside, "buffers")
    collective.mean_inside(mean, "statistics")
    return {
        "total": finish().tolist(),
        "found": [flat[0].tolist() for flat in found.values()],
        "values": [first[0].item(), inside[0].item(), mean[0].item()],
        "numbers": collective.gather_numbers([collective.rank]),
        "texts": collective.gather_inside(b"a" * (collective.rank + 1)),
        "sent": collective.sent_bytes,
    }


@pytest.mark.parametrize(("workers", "members"), [(2, 2), (3, 2), (2, 3)])
def test_members_say_the_same_as_over_gloo(workers: int, members: int) -> None:
    results, network = run_members_strictly(verbs, workers, members)
    greetings = [rank for rank, said in network.log if "send to" in said and "uint8[1]" in said]
    assert set(greetings) == set(range(workers * members))  # all have connected
    for rank, result in enumerate(results):
        worker, member = divmod(rank, members)
        first = worker * members
        assert result["total"] == [workers * entry + sum(range(workers)) for entry in range(5)]
        assert result["found"] == [[1.0 * worker] * 3] * (workers - 1)
        assert result["values"] == [0, first, first + (members - 1) / 2]
        assert result["numbers"] == [[other] for other in range(workers * members)]
        assert result["texts"] == ([b"a" * (first + each + 1) for each in range(members)] if member == 0 else [])
    shared = sum(result["sent"]["shared"] for result in results[:members])
    assert shared == all_reduce_bytes(20, workers)


def one_skips(collective: MemberCollective) -> None:
    if collective.rank != 3:
        collective.broadcast_inside(torch.ones(2), "buffers")
    collective.gather_numbers([1.0])


def other_order(collective: MemberCollective) -> None:
    """Each member waits for a partner that is in another group first, in a circle."""
    if collective.rank in (0, 3):
        collective.mean_inside(torch.ones(2), "statistics")
    collective.start_all_reduce(torch.ones(4), "shared")()
    if collective.rank in (1, 2):
        collective.mean_inside(torch.ones(2), "statistics")


def other_size(collective: MemberCollective) -> None:
    collective.mean_inside(torch.ones(2 + collective.member), "statistics")


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        (one_skips, Deadlock, r"worker 2 waits in broadcast in \(2, 3\).*worker 3 waits in all_gather"),
        (other_order, Deadlock, r"worker 0 waits in all_reduce in \(0, 1\).*worker 1 waits in all_reduce in \(1, 3\)"),
        (other_size, RuleBroken, r"mix up their operations: all_reduce in \(.*\[2\].*\[3\]"),
    ],
)
def test_members_that_do_different_things_are_told_so(target: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run_members_strictly(target, 2, 2)
