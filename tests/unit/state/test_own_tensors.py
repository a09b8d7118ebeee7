"""A worker's own tensors come back after the full model; writes by the user's code meanwhile stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning.state.own_tensors import OwnTensors


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.teacher = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))


@pytest.fixture
def module() -> Counting:
    return Counting()


def test_what_is_averaged_comes_back_and_what_is_written_stays(module: Counting) -> None:
    own = OwnTensors(module)
    own.keep(module.state_dict(keep_vars=True).values())
    with torch.no_grad():
        module.weight.fill_(5)
        module.seen.fill_(5)
    own.watch(())
    module.seen.data += 1  # not counted in the version
    assert own.written().keys() == {"seen"}
    assert torch.equal(own.as_in_training()[id(module.weight)], torch.ones(2))
    assert own.as_in_training()[id(module.seen)] is module.seen
    assert own.stop_watching() == {"seen"}
    own.restore()
    assert (module.weight.tolist(), module.seen.tolist()) == ([1, 1], [6, 6])


def test_nan_that_stays_is_no_write(module: Counting) -> None:
    module.seen[1] = torch.nan  # a place that is not filled yet
    own = OwnTensors(module)
    own.keep([module.seen])
    with torch.no_grad():
        module.seen[0] = 5
    own.watch(())
    assert own.written() == {}
    own.restore()
    assert module.seen[0] == 0


def test_writes_to_what_trains_or_is_named_are_not_the_user_s(module: Counting) -> None:
    own = OwnTensors(module)
    own.keep(())
    own.watch({"seen"})
    with torch.no_grad():
        for tensor in (module.weight, module.seen, module.teacher):
            tensor.add_(1)
    assert own.written().keys() == {"teacher"}


@pytest.mark.parametrize("exchanged", [False, True])
def test_weights_that_were_exchanged_after_a_note_are_noticed(module: Counting, exchanged: bool) -> None:
    own = OwnTensors(module)
    own.note([module.weight])
    if exchanged:
        module.weight.data.fill_(2)
    own.keep([module.weight])
    assert own.swapped == exchanged
