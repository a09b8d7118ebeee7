"""Contract 12: comparisons of the workers before they mix weights, and the messages about differences."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.checks.header import Header, Purpose, check_headers, header_numbers, read_header
from resist_lightning.errors import WorkersDisagree
from resist_lightning.schedule.round_length import LONGEST

SYNC = Header(purpose=Purpose.SYNC, round=3, step=10, stop=0, layout=77, round_steps=50)


@given(
    st.sampled_from(Purpose),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.integers(0, 1),
    st.integers(0, 2**48 - 1),
    st.integers(1, LONGEST),
)
def test_a_header_survives_the_way_as_numbers_of_64_bits(purpose, round, step, stop, layout, steps):
    header = Header(purpose, round, step, stop, layout, steps)
    numbers = [struct.unpack("<d", struct.pack("<d", number))[0] for number in header_numbers(header)]
    assert read_header(numbers) == header
    assert read_header([*numbers, 5.0, 6.0]) == header


def test_equal_headers_pass():
    check_headers([SYNC])
    check_headers([SYNC, dataclasses.replace(SYNC), dataclasses.replace(SYNC)])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("purpose", Purpose.EVALUATION, "purpose: worker 0 sync, worker 1 sync, worker 2 evaluation"),
        ("purpose", Purpose.FINISH, "worker 2 finish"),
        ("round", 4, "round: worker 0 3, worker 1 3, worker 2 4"),
        ("step", 9, "step: worker 0 10, worker 1 10, worker 2 9"),
        ("stop", 1, "stop: worker 0 0, worker 1 0, worker 2 1"),
        ("layout", 78, "layout: worker 0 77, worker 1 77, worker 2 78"),
        (
            "round_steps",
            72,
            "round_steps: worker 0 50, worker 1 50, worker 2 72; `local_steps` derives the length of a round",
        ),
    ],
)
def test_any_field_that_differs_is_named_with_the_value_of_every_worker(field, value, said):
    with pytest.raises(WorkersDisagree) as error:
        check_headers([SYNC, SYNC, dataclasses.replace(SYNC, **{field: value})])
    assert said in str(error.value)
    assert "No weights were mixed" in str(error.value)
    for other in {f.name for f in dataclasses.fields(Header)} - {field}:
        assert f"{other}: worker" not in str(error.value)


def test_all_differing_fields_are_named():
    with pytest.raises(WorkersDisagree, match=r"round: worker 0 3, worker 1 5; step: worker 0 10, worker 1 2"):
        check_headers([SYNC, dataclasses.replace(SYNC, round=5, step=2)])
