from __future__ import annotations

import pytest
import torch

from resist_lightning.checks.losses import FirstBadLoss, earliest

SOUND, NAN = torch.tensor(1.0), torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("losses", "step"),
    [([], 0), ([SOUND, SOUND], 0), ([SOUND, NAN, SOUND, NAN], 2), ([torch.tensor(-torch.inf)], 1)],
)
def test_the_first_bad_loss_of_a_round_is_known_by_its_step(losses, step):
    found, other = FirstBadLoss(watching=True), FirstBadLoss(watching=False)
    for number, loss in enumerate(losses):
        found.note(loss, number)
        other.note(loss, number)
    assert (found.step, other.step) == (step, 0)
    found.begin_round()
    assert found.step == 0


@pytest.mark.parametrize(("first", "members"), [([0, 0], [0, 1]), ([3, 2, 3], [1]), ([0, 4], [1]), ([2, 2, 3], [0, 1])])
def test_not_finite_values_come_from_those_with_the_earliest_bad_loss(first, members):
    assert earliest(first) == members
