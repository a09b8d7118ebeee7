"""Flat buffers: one for each data type, the same layout at both ends."""

from __future__ import annotations

import torch

from resist_lightning.comm.packing import copy_into, cut, empty_like_packed, pack, packed_bytes, unpack

CPU = torch.device("cpu")


def tensors():
    return [
        torch.arange(6.0).view(2, 3).t(),  # not contiguous
        torch.tensor(7),
        torch.empty(0, 4),
        torch.tensor([1.5, 2.5], dtype=torch.float16),
        torch.tensor([8.0]),
    ]


def test_what_is_packed_is_unpacked_in_order():
    flats = pack(tensors(), CPU)
    assert list(flats) == sorted(flats, key=str)
    assert {dtype: len(flat) for dtype, flat in flats.items()} == {torch.float16: 2, torch.float32: 7, torch.int64: 1}
    assert sum(flat.nbytes for flat in flats.values()) == packed_bytes(tensors())
    for value, original in zip(unpack(flats, tensors()), tensors(), strict=True):
        assert torch.equal(value, original)
        assert value.dtype == original.dtype


def test_a_receiver_without_the_tensors_allocates_the_same_buffers():
    absent = [tensor.to("meta") for tensor in tensors()]
    sent, room = pack(tensors(), CPU), empty_like_packed(absent, CPU)
    assert [(dtype, flat.shape) for dtype, flat in room.items()] == [(d, flat.shape) for d, flat in sent.items()]
    assert packed_bytes(absent) == packed_bytes(tensors())
    copy_into(room.values(), sent.values())
    assert all(torch.equal(a, b) for a, b in zip(unpack(room, absent), tensors(), strict=True))


def test_packing_copies_and_unpacking_does_not():
    [one] = tensors()[-1:]
    flats = pack([one], CPU)
    unpack(flats, [one])[0].zero_()
    assert one.item() == 8.0
    assert flats[torch.float32].item() == 0.0


def test_tensors_end_to_end_are_cut_into_pieces_of_a_length():
    assert list(cut([3, 0, 4, 1], 2)) == [
        [(0, 0, 2)],
        [(0, 2, 3), (2, 0, 1)],
        [(2, 1, 3)],
        [(2, 3, 4), (3, 0, 1)],
    ]
    assert list(cut([3], 2)) == [[(0, 0, 2)], [(0, 2, 3)]]
    assert list(cut([0, 0], 2)) == []
