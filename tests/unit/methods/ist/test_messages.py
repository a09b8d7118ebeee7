"""Messages of pieces: large ones are split in three, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning import NeuronConfig
from resist_lightning.methods.ist import messages
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece
from tests.helpers.ist import Run, train_engine
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states

ROWS, COLUMNS = 40, 30
PART = Part(Cut(0, 1), (ROWS, COLUMNS), 0, torch.empty(0))
CELLS = st.lists(st.integers(0, 29), min_size=1, unique=True).map(lambda found: tuple(sorted(found)))
PIECES = st.lists(st.builds(lambda rows, columns: Piece(0, 1, rows, columns), st.none() | CELLS, CELLS), min_size=1)


def entries_of(pieces):
    found = []
    for key, piece in pieces:
        for row in range(ROWS) if piece.rows is None else piece.rows:
            found += [(key, row, column) for column in piece.columns]
    return found


@given(PIECES)
def test_a_large_message_goes_in_three_of_an_eighth_most_and_an_eighth(pieces):
    keyed = [(str(number), piece) for number, piece in enumerate(pieces)]
    parts = dict.fromkeys((key for key, _ in keyed), PART)
    size = len(entries_of(keyed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_WORTH_DIVIDING", 1)
        turns = [turn.get(1, []) for turn in messages._in_three({1: keyed}, parts)]
        patch.setattr(messages, "_WORTH_DIVIDING", size + 1)
        assert messages._in_three({1: keyed}, parts) == [{1: keyed}, {}, {}]
    assert [entry for turn in turns for entry in entries_of(turn)] == entries_of(keyed)
    assert all(piece.rows != () for turn in turns for _, piece in turn)
    # An extra row at each border, or the rest of a piece without rows.
    more = ROWS * COLUMNS if any(piece.rows is None for piece in pieces) else COLUMNS
    assert len(entries_of(turns[0])) <= size // 8 + more
    assert len(entries_of(turns[2])) <= size // 8


def train(collective, run):
    return train_engine(run, collective.worker, None, collective)[1], dict(collective.sent_bytes)


@pytest.mark.parametrize(
    "run",
    [
        Run(NeuronConfig(local_steps=1, momentum="travel", min_share=0), 5, "conv", "adamw"),
        Run(NeuronConfig(local_steps=1, momentum="keep", growth=(0.1, 0.6), finish_rounds=1), 5),
    ],
    ids=["one holder", "growth"],
)
def test_divided_messages_bring_the_same_to_the_same_places_in_as_many_bytes(run, monkeypatch):
    whole, _ = run_threads(train, 3, run)
    monkeypatch.setattr(messages, "_WORTH_DIVIDING", 8)
    divided, _ = run_threads(train, 3, run)
    for (state, sent), (expected, sent_whole) in zip(divided, whole, strict=True):
        assert_equal_states(state, expected, exactly=True)
        assert sent == sent_whole
