"""Fingerprints of workers that were started differently, or hold unequal tensors, differ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.checks.fingerprint import describe_unequal, differences, digest, shorten

BASE = {
    "versions": {"torch": "2.15.0", "Python": "3.12.3"},
    "settings": {"min_blocks": "5"},
    "blocks": {"layer3.6": ""},
    "tensors": {f"conv{i}": "(3, 3) float32" for i in range(8)},
}


def changed(topic, **values):
    return {**BASE, topic: {**BASE[topic], **values}}


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([changed("versions", torch="2.13.0")], ["torch: worker 0 2.15.0, worker 1 2.13.0"]),
        ([BASE, changed("settings", min_blocks="3")], ["min_blocks: worker 0 5, worker 1 5, worker 2 3"]),
        ([changed("blocks", **{"layer3.7": ""})], ["blocks: only worker 1 has layer3.7"]),
        ([{**BASE, "blocks": {}}, BASE], ["blocks: only workers 0 and 2 have layer3.6"]),
        (
            [changed("versions", torch="2.13.0"), changed("settings", min_blocks="3")],
            [
                "torch: worker 0 2.15.0, worker 1 2.13.0, worker 2 2.15.0",
                "min_blocks: worker 0 5, worker 1 5, worker 2 3",
            ],
        ),
        ([{**BASE, "code": {"net": "a1"}}], ["code: only worker 1 has net"]),
        ([BASE, BASE], []),
    ],
)
def test_every_difference_is_told_with_the_value_of_every_worker(others, said):
    assert differences([BASE, *others]) == said


def test_long_lists_are_cut():
    other = {**BASE, "tensors": {f"conv{i}": "(3, 3) float64" for i in range(8)}}
    told = differences([BASE, other])
    assert told[:5] == [f"conv{i}: worker 0 (3, 3) float32, worker 1 (3, 3) float64" for i in range(5)]
    assert told[5:] == ["and 3 more tensors"]
    more = {**BASE, "blocks": {**BASE["blocks"], **{f"new{i}": "" for i in range(17)}}}
    assert differences([BASE, more]) == ["blocks: only worker 1 has new0, new1, new2, new3, new4 and 12 more"]
    assert shorten(["a", "b", "c", "d", "e"]) == "a, b, c, d, e"


words = st.sampled_from(["", "a", "b", '"'])
fingerprints = st.dictionaries(words, st.dictionaries(words, words))


@given(fingerprints, fingerprints)
def test_digests_differ_where_and_only_where_there_is_a_difference_to_tell(one, other):
    assert (digest(one) != digest(other)) == (one != other)
    filled = [{topic: names for topic, names in f.items() if names} for f in (one, other)]
    assert bool(differences([one, other])) == (filled[0] != filled[1])
    assert 0 <= digest(one) < 2**48


@pytest.mark.parametrize(
    ("hashes", "said"),
    [
        ([[1, 2], [1, 3], [1, 2]], "b (worker 1 differs from the others)"),
        ([[1, 2], [1, 3]], "b (workers 0 and 1 differ)"),
        ([[1, 2], [1, 3], [4, 5]], "a (worker 2 differs from the others), b (workers 0, 1 and 2 differ)"),
        ([[1, 2], [1, 2], [1, 2], [1, 3], [1, 4]], "b (workers 3 and 4 differ from the others)"),
        ([[1, 2], [1, 2]], ""),
    ],
)
def test_unequal_tensors_are_named_with_those_who_differ_from_most(hashes, said):
    assert describe_unequal(["a", "b"], hashes) == said


def test_of_many_unequal_tensors_the_first_are_named():
    names = [f"t{i}" for i in range(9)]
    told = describe_unequal(names, [[0] * 9, [1] * 9])
    assert told.startswith("t0 (workers 0 and 1 differ), t1 ")
    assert told.endswith(" and 4 more")
