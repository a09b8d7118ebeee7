"""Hashes depend on every bit and its place; samples cover every entry in the end."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.checks.hashing import SAMPLED_SHARE, Hasher, as_numbers, together

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64]


HASHERS = {share: Hasher(share) for share in (1, SAMPLED_SHARE)}


def number(tensor, turn=0, share=1):
    return as_numbers(HASHERS[share].hashes([tensor], turn))[0]


def filled(dtype, size=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 100, (size,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flip_of_any_bit_anywhere_shows(dtype):
    tensor = filled(dtype)
    expected, raw = number(tensor), tensor.view(torch.uint8)
    seen = set()
    for place in range(len(raw)):
        for bit in range(8):
            raw[place] ^= 1 << bit
            seen.add(number(tensor))
            raw[place] ^= 1 << bit
    assert number(tensor) == expected
    assert expected not in seen
    assert len(seen) == 8 * len(raw)


def test_an_exchange_of_two_entries_shows():
    tensor = torch.arange(20.0)
    swapped = set()
    for first in range(20):
        for second in range(first):
            other = tensor.clone()
            other[[first, second]] = other[[second, first]]
            swapped.add(number(other))
    assert number(tensor) not in swapped
    assert len(swapped) == 20 * 19 / 2


def test_zeros_with_a_sign_and_nan_are_bits_like_others():
    assert number(torch.tensor([0.0])) != number(torch.tensor([-0.0]))
    assert number(torch.tensor([torch.nan])) == number(torch.tensor([torch.nan]))


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16])
def test_tensors_of_any_size_and_a_change_in_every_part_of_them(size):
    tensor = torch.ones(size)
    expected = number(tensor)
    for place in {0, size // 2, size - 1} if size else ():
        tensor[place] = 2
        assert number(tensor) != expected
        tensor[place] = 1
    assert number(tensor) == expected
    assert 0 <= expected < 2**48


def test_a_sample_sees_a_share_of_a_large_tensor_and_in_as_many_turns_all_of_it():
    tensor = torch.zeros(5000)  # four rows of 1024, and a rest
    expected = [number(tensor, turn, SAMPLED_SHARE) for turn in range(SAMPLED_SHARE)]
    for place in (0, 15, 16, 1023, 1024, 4095):
        tensor[place] = 1
        found = [turn for turn in range(SAMPLED_SHARE) if number(tensor, turn, SAMPLED_SHARE) != expected[turn]]
        assert found == [place // 16 % SAMPLED_SHARE]
        assert number(tensor, found[0] + SAMPLED_SHARE, SAMPLED_SHARE) != expected[found[0]]
        tensor[place] = 0
    for place in (4096, 4999):
        tensor[place] = 1
        assert all(number(tensor, turn, SAMPLED_SHARE) != expected[turn] for turn in range(SAMPLED_SHARE))
        tensor[place] = 0


def test_a_sample_sees_small_tensors_whole():
    tensor = torch.zeros(100)
    expected = number(tensor, 0, SAMPLED_SHARE)
    tensor[77] = 1
    assert number(tensor, 0, SAMPLED_SHARE) != expected


def test_any_memory_format_and_views_of_a_buffer():
    tensor = torch.arange(120.0).view(2, 3, 4, 5)
    last = tensor.to(memory_format=torch.channels_last)
    flat = torch.cat([torch.zeros(3), tensor.flatten()])
    assert number(flat[3:].view(2, 3, 4, 5)) == number(tensor)
    expected = number(last)
    last[1, 2, 3, 4] = -1
    assert number(last) != expected
    assert number(tensor[:, ::2]) == number(tensor[:, ::2].clone())


def test_together_the_order_counts():
    hashes = Hasher(1).hashes([torch.ones(3), torch.zeros(3), torch.ones(3)], 0)
    one, other, _ = as_numbers(hashes)
    assert one != other
    assert as_numbers([together(hashes[:2])]) != as_numbers([together(hashes[1:])])
