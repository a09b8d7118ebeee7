"""A single worker sends nothing; the collective of several is tested in ``tests/distributed``."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.comm.collective import SoloCollective


def test_alone_a_worker_hears_itself_and_sends_nothing():
    collective = SoloCollective()
    flat = torch.tensor([1.0, 2.0])
    assert collective.gather_numbers([1.0, 2.0]) == [[1.0, 2.0]]
    assert collective.gather_bytes(b"text") == [b"text"]
    assert collective.start_all_reduce(flat, "shared")() is flat
    collective.broadcast_(flat, "start")
    collective.exchange({}, {}, {})
    assert flat.tolist() == [1.0, 2.0]
    assert not collective.sent_bytes


@pytest.mark.parametrize(
    "start", [lambda c, flat: c.start_send(flat, 1, 0, "boundary"), lambda c, flat: c.start_receive(flat, 1, 0)]
)
def test_alone_a_worker_has_nobody_to_send_to(start):
    with pytest.raises(ValueError, match="worker 1 does not exist: this run has one worker"):
        start(SoloCollective(), torch.zeros(1))
