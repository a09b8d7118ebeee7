"""A companion copy of a module: it holds the same parts, and is shown in its place."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import PartialModelError
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.state.companion import Companion


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 3)
        self.register_buffer("seen", torch.zeros(()))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Companion]:
    copy = Recurrent()
    module = deepcopy(copy).to(dtype)
    with torch.no_grad():
        for tensor in named_tensors(copy).values():
            tensor.add_(1 / 3)
    companion = Companion(module, copy)
    module.register_buffer("late", torch.ones(2), persistent=False)  # as by a first forward: the copy has none
    return module, copy, companion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_showing_the_copy_and_hiding_it_changes_neither_it_nor_the_module(dtype: torch.dtype) -> None:
    module, copy, companion = make(dtype)
    before, average = values(module), values(copy)

    with companion.showing():
        shown = values(module)
        assert companion.shown

    assert all(torch.equal(shown[name], average[name].to(dtype)) for name in average)
    assert all(torch.equal(value, before[name]) for name, value in values(module).items())
    assert all(torch.equal(value, average[name]) for name, value in values(copy).items())
    assert not companion.shown


def test_what_is_written_while_the_copy_is_shown_stays_in_both() -> None:
    module, copy, companion = make()
    companion.keep(["seen"])  # no effect yet
    assert copy.seen != module.seen
    companion.show()
    module.seen.fill_(7)
    companion.keep(["seen"])
    companion.hide()

    assert module.seen == copy.seen == 7


def test_the_copy_goes_with_the_parts_of_the_module() -> None:
    module, copy, companion = make()
    before = values(copy)

    companion.hold(["seen"])
    assert companion.present().keys() == companion.state().keys() == {"seen"}
    with pytest.raises(PartialModelError, match=r"the average of rnn\.weight_ih_l0 cannot be read"):
        copy.rnn.weight_ih_l0.sum()
    assert companion.bytes(before) == sum(tensor.nbytes for tensor in before.values())

    companion.settle()
    zeros = torch.zeros(1, 3)
    assert torch.equal(copy.rnn(zeros)[0], module.rnn(zeros)[0])
