"""A rounding remainder stays with its tensor, whatever else is averaged."""

from __future__ import annotations

import torch

from resist_lightning.comm.feedback import Feedback


def test_remainders_follow_their_tensors_into_another_order_and_are_forgotten_with_them():
    a, b, c = torch.zeros(2), torch.zeros(2, 2), torch.zeros(1)
    feedback = Feedback()
    feedback.flat([a, b]).copy_(torch.arange(6.0))
    assert feedback.flat([a, b]).tolist() == [0, 1, 2, 3, 4, 5]
    assert feedback.flat([b, c, a]).tolist() == [2, 3, 4, 5, 0, 0, 1]
    assert feedback.flat([c, b]).tolist() == [0, 2, 3, 4, 5]
    assert feedback.of(a) is None
    assert feedback.flat([a]).tolist() == [0, 0]


def test_what_is_loaded_is_what_was_told():
    a, b = torch.zeros(2), torch.zeros(3)
    feedback, other = Feedback(), Feedback()
    feedback.flat([a, b]).copy_(torch.arange(5.0))
    other.load([(a, feedback.of(a).clone()), (b, feedback.of(b).clone())])
    assert other.of(b).tolist() == [2, 3, 4]
    assert other.flat([b, a]).tolist() == [2, 3, 4, 0, 1]
