from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from resist_lightning.checkpoint.files import read_file, write_file
from resist_lightning.state.random_state import (
    RandomStream,
    random_numbers_apart,
    random_state,
    seed_generators,
    set_random_state,
)


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), random.random(), random.gauss(0, 1), float(np.random.rand())


def test_generators_go_on_from_a_state_that_was_written_to_a_file(tmp_path: Path) -> None:
    random.gauss(0, 1)  # keeps a number for the next call
    write_file(random_state(), tmp_path / "state")
    expected = [draw() for _ in range(3)]

    set_random_state(read_file(tmp_path / "state"))

    assert [draw() for _ in range(3)] == expected


def test_what_is_drawn_apart_moves_no_generator() -> None:
    random.gauss(0, 1)
    before = random_state()
    expected = draw()
    set_random_state(before)

    with pytest.raises(ZeroDivisionError), random_numbers_apart():
        _ = (seed_generators(5), draw(), 1 / 0)

    assert draw() == expected


def test_a_stream_goes_on_where_it_was_left_and_moves_no_generator(tmp_path: Path) -> None:
    def from_stream(stream: RandomStream) -> tuple[float, ...]:
        with stream.drawn():
            return draw()

    seed_generators(5)
    expected = draw()
    seed_generators(5)
    stream, other = RandomStream("stage 0"), RandomStream("stage 1")
    assert stream.state_dict() == {}
    found = [from_stream(stream), from_stream(other), from_stream(stream)]
    assert draw() == expected
    # Each number once: neither from the generators, nor in both streams, nor twice in one.
    assert len({number for numbers in (*found, expected) for number in np.ravel(numbers)}) == 16

    write_file(stream.state_dict(), tmp_path / "state")
    resumed = RandomStream("stage 0")
    resumed.load_state_dict(read_file(tmp_path / "state"))
    assert from_stream(resumed) == from_stream(stream)

    seed_generators(5)
    assert from_stream(RandomStream("stage 0")) == found[0]


def test_a_seed_of_64_bits_starts_every_generator() -> None:
    def drawn(seed: int) -> tuple[float, ...]:
        seed_generators(seed)
        return draw()

    seeds = [0, 1, 2**32, 2**63 + 1, 2**64 - 1]
    assert [drawn(seed) for seed in seeds] == [drawn(seed) for seed in seeds]
    for each in zip(*(drawn(seed)[1:] for seed in seeds), strict=True):  # torch's takes the lower half of a seed
        assert len(set(each)) == len(seeds)
    assert len({drawn(seed)[0] for seed in (0, 1, 2, 2**63 + 3)}) == 4
    assert all(drawn(seed)[1] != drawn(seed)[3] for seed in seeds)  # Python's and NumPy's are the same algorithm
