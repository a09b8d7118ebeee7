"""The mean over the workers that are not left out."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.comm.mean import mean_at_first, mean_into, move_by, start_mean
from resist_lightning.comm.tensors import averaged_bytes
from tests.helpers.threads import run_threads


def mean_of(collective, values, left_out, dtype):
    flat = torch.tensor([values[collective.worker], 1], dtype=dtype)
    finish = start_mean(collective, flat, "shared", left_out)
    finish()
    return flat.tolist()


@pytest.mark.parametrize(
    ("values", "left_out", "dtype", "expected"),
    [
        ([1.0, 2.0, 6.0], (), torch.float64, 3.0),
        ([1.0, torch.nan, 6.0], (1,), torch.float64, 3.5),
        ([torch.inf, torch.nan, 6.0], (0, 1), torch.float64, 6.0),
        # In 16 bits 256 + 1 is 256, and three times 60,000 is infinity.
        ([256.0, 1.0, 1.0], (), torch.bfloat16, 86.0),
        ([60000.0, 60000.0, 60000.0], (), torch.float16, 60000.0),
        ([-5, 9, -7], (1,), torch.int64, -5),
        ([False, True, False], (1,), torch.bool, False),
        ([-torch.inf, -torch.inf, -torch.inf], (2,), torch.float32, -torch.inf),
    ],
)
def test_values_of_workers_that_are_left_out_do_not_count(values, left_out, dtype, expected):
    results, _ = run_threads(mean_of, 3, values, left_out, dtype)
    assert results == [results[0]] * 3
    assert results[0] == pytest.approx([expected, 1])

    firsts, _ = run_threads(mean_of_first, 3, values, left_out, dtype)
    assert firsts[0][0] == pytest.approx([expected, 1])
    for worker in (1, 2):
        kept, sent = firsts[worker]
        torch.testing.assert_close(kept, torch.tensor([values[worker], 1], dtype=dtype), rtol=0, atol=0, equal_nan=True)
        assert sent == (0 if worker in left_out else 2 * dtype.itemsize)


def mean_of_first(collective, values, left_out, dtype):
    flat = torch.tensor([values[collective.worker], 1], dtype=dtype)
    mean_at_first(collective, flat, "shared", left_out)
    return (flat.tolist() if collective.worker == 0 else flat), collective.sent_bytes["shared"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_received_copies_are_summed_in_32_bits_too(dtype):
    own, *others = (torch.tensor([256.0, value], dtype=dtype) for value in (256.0, 1.0, 1.0))
    mean_into(own, others)
    assert own.tolist() == [256.0, 86.0]


def test_infinite_values_that_are_equal_stay() -> None:
    own, other = (torch.tensor([-torch.inf, torch.inf, value]) for value in (1.0, 3.0))
    mean_into(own, [other, own.clone()])
    assert own.tolist() == [-torch.inf, torch.inf, pytest.approx(5 / 3)]
    move_by(own, start=other, end=other + 1)
    assert own.tolist() == [-torch.inf, torch.inf, pytest.approx(8 / 3)]


def test_what_a_sum_sends_is_as_wide_as_the_sum():
    sizes = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 4, torch.complex32: 8, torch.complex64: 8}
    assert {dtype: averaged_bytes(torch.empty(3, dtype=dtype, device="meta")) for dtype in sizes} == {
        dtype: 3 * size for dtype, size in sizes.items()
    }


def test_complex_numbers_of_16_bits_are_averaged_in_place():
    def mean(collective):
        flat = torch.tensor([complex(256 if collective.worker == 0 else 1, 2)], dtype=torch.complex32)
        start_mean(collective, flat, "shared")()
        return flat.tolist()

    assert run_threads(mean, 3)[0] == [[complex(86, 2)]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_a_shift_keeps_what_is_learned_meanwhile(dtype):
    start, end, own = (torch.tensor([value, 2 * value]).to(dtype) for value in (1.0, 3.0, 1.5))
    move_by(own, start, end)
    assert own.dtype == dtype
    assert own.to(torch.complex64).real.tolist() == [3.5, 7.0]
