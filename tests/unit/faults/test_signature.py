from __future__ import annotations

import pytest

from resist_lightning.faults.signature import Signature

SIGNED = Signature(b"k" * 32).sign("run/1", "ü").encode()


def test_the_lines_of_the_workers_are_believed() -> None:
    assert Signature(b"k" * 32).verify("run/1", SIGNED) == "ü"


@pytest.mark.parametrize(
    ("key", "place", "posted"),
    [
        (b"K" * 32, "run/1", SIGNED),
        (b"k" * 32, "run/2", SIGNED),
        (b"k" * 32, "run/1", SIGNED + b" "),
        (b"k" * 32, "run/1", b"0" + SIGNED[1:] if SIGNED[:1] != b"0" else b"1" + SIGNED[1:]),
        (b"k" * 32, "run/1", SIGNED[32:]),
        (b"k" * 32, "run/1", b"\xff" * 40),
        (b"k" * 32, "run/1", b""),
        (b"k" * 32, "run/1", SIGNED[:32] + b"x" * 1_000_000),
    ],
    ids=["key", "place", "text", "tag", "no tag", "binary", "empty", "huge"],
)
def test_a_line_from_anywhere_else_is_not(key: bytes, place: str, posted: bytes) -> None:
    assert Signature(key).verify(place, posted) is None
