"""Globs match the last parts of a name, and lists of names are abbreviated."""

from __future__ import annotations

import pytest

from resist_lightning.methods.globs import matches, summary


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer3.*", "net.layer3.1", True),
        ("layer3.*", "net.layer3.1.conv1", False),
        ("layer3.[!0]*", "layer3.0", False),
        ("net.layer3.1", "layer3.1", False),
        ("*", "layer3", True),
    ],
)
def test_a_glob_matches_as_many_parts_as_it_has(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layer3.1", "layer3.2", "layer3.3", "layer4.1"], "layer3.1-3, layer4.1"),
        (["layers.encoder_layer_9", "layers.encoder_layer_10"], "layers.encoder_layer_9-10"),
        (["body.1", "body.3"], "body.1, body.3"),
        (["student.net", "teacher.net"], "student.net, teacher.net"),
        ([], ""),
    ],
)
def test_numbered_siblings_that_follow_each_other_are_a_run(names: list[str], expected: str) -> None:
    assert summary(names) == expected
