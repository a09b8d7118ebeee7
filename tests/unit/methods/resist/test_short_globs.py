"""Globs that match exactly the given blocks."""

from __future__ import annotations

import pytest

from resist_lightning.methods.globs import matches
from resist_lightning.methods.resist.short_globs import short_globs

NAMES = [f"net.{stage}.{index}" for stage in ("layer1", "layer2", "trunk") for index in range(12)]


def choose(globs):
    return [name for name in NAMES if any(matches(glob, name) for glob in globs)]


@pytest.mark.parametrize(
    ("wanted", "globs"),
    [
        ([name for name in NAMES if "trunk" in name], ("trunk.*",)),
        ([name for name in NAMES if "trunk" in name and not name.endswith(".0")], ("trunk.[!0]*",)),
        ([name for name in NAMES if "layer" in name], ("layer*.*",)),
        ([name for name in NAMES if not name.endswith(".0")], ("net.*.[!0]*",)),
        (["net.layer2.3"], ("layer2.3",)),
        (["net.layer1.1", "net.layer1.3"], ("net.layer1.1", "net.layer1.3")),
    ],
)
def test_the_shortest_exact_globs(wanted, globs):
    assert short_globs(wanted, choose) == globs
    assert choose(globs) == wanted


def test_a_name_that_is_a_number_is_shown_with_its_container():
    names = ["features.1.0", "features.1.1", "features.3.0", "features.3.1"]

    def chosen(globs):
        return [name for name in names if any(matches(glob, name) for glob in globs)]

    assert short_globs(["features.3.0", "features.3.1"], chosen) == ("features.3.*",)
    assert short_globs(["features.3.0"], chosen) == ("features.3.0",)
    assert short_globs(names, chosen) == ("features.*.*",)
