"""Messages at the start and at the end of a training."""

from __future__ import annotations

import pytest

from resist_lightning import Config
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.strategies.summary import division_in_words
from tests.helpers.nets import small_preact


@pytest.mark.parametrize(("workers", "alone"), [(1, True), (2, False)])
def test_a_single_worker_is_told_how_to_get_others(workers: int, alone: bool) -> None:
    """A Trainer without `devices` has one on CPUs, and the training said that blocks are partitioned over it."""
    said = division_in_words(BlockLayout(small_preact(), Config(min_blocks=1), workers), 1)
    assert ("nothing is divided; Trainer(devices=..., num_nodes=...)" in said) == alone
