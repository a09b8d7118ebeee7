"""The mean over those workers that count."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.comm.mean import start_mean
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
        ([-5, 9, -7], (1,), torch.int64, -5),
        ([False, True, False], (1,), torch.bool, False),
        ([-torch.inf, -torch.inf, -torch.inf], (2,), torch.float32, -torch.inf),
    ],
)
def test_values_of_workers_that_are_left_out_do_not_count(values, left_out, dtype, expected):
    results, _ = run_threads(mean_of, 3, values, left_out, dtype)
    assert results == [results[0]] * 3
    assert results[0] == pytest.approx([expected, 1])
