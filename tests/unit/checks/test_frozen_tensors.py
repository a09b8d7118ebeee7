"""All kinds of writes to frozen tensors are found; ``tests/distributed/test_teachers.py`` trains with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config
from resist_lightning.checks.frozen_tensors import FrozenTensors
from resist_lightning.methods.resist.layout import BlockLayout


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(8, 600)
        self.teacher = nn.Linear(8, 600).requires_grad_(False)


def noted(module: nn.Module, workers: int = 2) -> FrozenTensors:
    frozen = FrozenTensors(BlockLayout(module, Config(blocks=()), workers))
    frozen.note()
    return frozen


def change_one_entry(weight: Tensor) -> None:
    weight.view(-1)[100] += 1  # an entry that is in no sample of 16 in 1024


def write_the_same(weight: Tensor) -> None:
    weight.copy_(weight.clone())


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda weight: weight.mul_(0.9), True),
        (lambda weight: weight.data.mul_(0.9), True),
        (change_one_entry, True),
        (write_the_same, False),
        (lambda weight: weight.sum(), False),
    ],
    ids=["in place", "by .data", "one entry", "the same values", "read"],
)
def test_what_has_changed_is_found(write: Callable[[Tensor], object], found: bool) -> None:
    module = Distilled()
    frozen = noted(module)
    write(module.teacher.weight)
    assert frozen.written() == (["teacher.weight"] if found else [])


def test_what_trains_is_not_frozen_until_it_stops() -> None:
    module = Distilled()
    frozen = noted(module)
    with torch.no_grad():
        module.student.weight.add_(1)
    assert frozen.written() == []
    module.student.requires_grad_(False)
    frozen.note()
    assert frozen.written() == []
    module.student.bias.add_(1)
    assert frozen.written() == ["student.bias"]


def test_one_worker_alone_has_nobody_to_differ_from() -> None:
    module = Distilled()
    frozen = noted(module, workers=1)
    module.teacher.weight.add_(1)
    assert frozen.written() == []
