"""The mean of entries over their holders, against plain Python numbers."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.methods.ist.merging import write_means
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece
from tests.helpers.partitions import of_holders

HELD = (of_holders([{0, 1, 2}, {0, 1}, {2}], 3),)
"""Worker 0 has the rows 0 and 1, worker 1 too, worker 2 the rows 0 and 2."""


def means(values, left_out=(), dtype=torch.float32):
    """Rows 0 and 1 of worker 0, each of one number, after averaging the values that the workers sent."""
    part = Part(Cut(0, None), (3, 1), 0, torch.tensor([[100.0], [200.0]], dtype=dtype))
    arrived = []
    for worker, (rows, numbers) in values.items():
        arrived.append((Piece(worker, 0, rows, None), torch.tensor(numbers, dtype=dtype)))
    write_means(part, arrived, HELD, left_out)
    return part.tensor.flatten().tolist()


def test_each_entry_becomes_the_mean_over_those_that_sent_it():
    assert means({0: ((0, 1), [1.0, 2.0]), 1: ((0, 1), [3.0, 6.0]), 2: ((0,), [8.0])}) == [4.0, 4.0]
    assert means({0: ((0,), [1.0]), 1: ((0,), [3.0])}) == [2.0, 200.0], "nobody sent row 1"


def test_a_worker_that_is_left_out_counts_only_where_nobody_else_has_a_value():
    sent = {1: ((0,), [3.0]), 0: ((0, 1), [1.0, 2.0]), 2: ((0,), [5.0])}
    assert means(sent, left_out=(0,)) == [4.0, 2.0]


@pytest.mark.parametrize("number", [0.1, 1e-3, 3.3333333])
def test_what_is_equal_everywhere_stays_as_it_is(number):
    exact = torch.tensor(number).item()
    assert means({worker: ((0,), [number]) for worker in range(3)})[0] == exact


def test_sixteen_bits_are_rounded_once():
    """A sum of 1 + 1/128 and other terms in 16 bits would lose the last bit at every step."""
    values = [1.0078125, 1.0, 1.0]
    found = means({w: ((0,), [v]) for w, v in enumerate(values)}, dtype=torch.bfloat16)[0]
    assert found == torch.tensor(sum(values) / 3).bfloat16().item()


def test_complex_numbers_have_a_mean_too():
    found = means({0: ((0,), [1 + 2j]), 1: ((0,), [3 - 4j])}, dtype=torch.complex64)[0]
    assert found == 2 - 1j
