"""Workers as threads: no message between two of them is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest

from resist_lightning.methods.auxnet.step.messages import Tag
from tests.helpers.threads import ThreadCollective, run_threads


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Make threads interrupt each other at nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def first_box(collective: ThreadCollective) -> Queue[Any]:
    collective.room.barrier.wait()
    return collective.room.box(0, 1, Tag.TRUTH)


def test_sender_and_receiver_who_ask_at_the_same_time_have_one_box(hasty_threads: None) -> None:
    pairs = [run_threads(first_box, 2)[0] for _ in range(500)]
    assert all(of_sender is of_receiver for of_sender, of_receiver in pairs)
