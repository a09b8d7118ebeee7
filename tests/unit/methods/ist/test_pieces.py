"""Pieces of divided tensors: read and written in every memory format, some rows at a time."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.methods.ist import pieces
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece

ROWS, COLUMNS = (1, 2, 5), (0, 3)


def channels_last():
    return torch.randn(6, 4, 2, 3).to(memory_format=torch.channels_last)


TENSORS = {
    "plain": (lambda: torch.randn(6, 4), 1),
    "transposed in memory": (lambda: torch.randn(4, 6).t(), 1),
    "channels_last": (channels_last, 1),
    "several columns for a neuron": (lambda: torch.randn(6, 20), 5),
}


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
@pytest.mark.parametrize("case", TENSORS)
def test_what_is_taken_and_put_is_what_indexing_gives(case, at_once, monkeypatch):
    monkeypatch.setattr(pieces, "_AT_ONCE", at_once)
    make, repeat = TENSORS[case]
    tensor, cut = make(), Cut(0, 1, repeat)
    part = Part(cut, tuple(tensor.shape), 0, tensor)
    piece = Piece(0, 0, ROWS, COLUMNS, leaves="full", enters="full")
    columns = [column * repeat + place for column in COLUMNS for place in range(repeat)]
    expected = tensor[torch.tensor(ROWS).unsqueeze(1), torch.tensor(columns)]

    message = torch.zeros(part.entries(piece) + 2)
    part.take(piece, [], into=message[1:-1])
    assert torch.equal(message[1:-1], expected.flatten())
    assert message[0] == message[-1] == 0
    assert torch.equal(part.take(piece, []), expected.flatten())

    written = tensor.clone()
    written[torch.tensor(ROWS).unsqueeze(1), torch.tensor(columns)] = -expected
    part.put(piece, [], -expected.flatten())
    assert torch.equal(tensor, written)
