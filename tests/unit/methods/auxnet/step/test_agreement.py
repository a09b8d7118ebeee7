"""The check that all workers see the same batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resist_lightning.comm.collective import SoloCollective
from resist_lightning.errors import WorkersDisagree
from resist_lightning.methods.auxnet.step.agreement import check_equal, named_tensors
from tests.helpers.threads import ThreadCollective, run_threads


def batch() -> Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(4, 2, 3)


def outcome(collective: ThreadCollective, workers: list[Mapping[str, Tensor]]) -> str:
    """The error message, or an empty string."""
    try:
        check_equal(collective, workers[collective.worker], "step 50")
    except WorkersDisagree as error:
        return str(error)
    return ""


def message(*workers: Mapping[str, Tensor]) -> str:
    """The error message, which must be the same on all workers."""
    messages, _ = run_threads(outcome, len(workers), list(workers))
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize(
    "tensor",
    [
        batch(),
        batch().to(torch.bfloat16),
        batch().to(torch.int64),
        batch() > 3,
        batch().to(torch.complex64).conj(),
        torch.full((4,), float("nan")),
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.empty(3, 0),
        torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last),
    ],
)
def test_equal_tensors_agree_whatever_their_kind_and_memory(tensor: Tensor) -> None:
    assert message({"batch": tensor}, {"batch": tensor.clone()}, {"batch": tensor.contiguous()}) == ""


def test_two_numbers_are_sent_where_all_agree() -> None:
    _, room = run_threads(outcome, 2, [{"batch": batch()}] * 2)

    assert [call[1] for call in room.log] == ["gather_numbers"] * 2


def test_samples_that_differ_are_named_with_their_tensor_and_the_workers() -> None:
    other = batch()
    other[1, 0, 0] += 1e-5
    other[3] = 0
    labels = torch.arange(4)

    told = message(
        {"batch[0]": batch(), "batch[1]": labels},
        {"batch[0]": other, "batch[1]": labels},
        {"batch[0]": batch(), "batch[1]": labels},
    )

    assert told.startswith(
        "step 50: the workers do not see the same batch: "
        "batch[0] differs in 2 of 4 samples (1, 3) between workers 0, 2 and worker 1. Every worker must"
    )
    assert "shuffle=True" in told
    assert "use_distributed_sampler=True" in told
    assert "seeded by the rank" in told
    assert "training_step" in told


def test_the_same_samples_in_another_order_differ() -> None:
    assert "batch differs in 4 of 4 samples (0, 1, 2, 3)" in message({"batch": batch()}, {"batch": batch().flip(0)})


def test_of_many_samples_the_first_are_listed() -> None:
    told = message({"x": torch.zeros(20)}, {"x": torch.ones(20)})

    assert "x differs in 20 of 20 samples (0, 1, 2, 3, 4, 5, 6, 7, ...) between worker 0 and worker 1" in told


def test_numbers_without_a_batch_differ_too() -> None:
    told = message({"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)})

    assert "x differs between worker 0 and worker 1" in told


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"x": torch.zeros(3)}, "x is torch.float32 of shape (4,) on workers 0, 2 and torch.float32 of shape (3,) on"),
        ({"x": torch.zeros(2, 2)}, "torch.float32 of shape (2, 2) on worker 1"),
        ({"x": torch.zeros(4, dtype=torch.int32)}, "torch.int32 of shape (4,) on worker 1"),
        ({}, "x does not exist on worker 1"),
        ({"y": torch.zeros(4)}, "x does not exist on worker 1; y does not exist on workers 0, 2"),
    ],
)
def test_other_shapes_types_and_names_are_named(other: dict[str, Tensor], told: str) -> None:
    assert told in message({"x": torch.zeros(4)}, other, {"x": torch.zeros(4)})


def test_one_worker_agrees_with_itself() -> None:
    check_equal(SoloCollective(), {"x": batch()}, "step 0")


class Pair(NamedTuple):
    image: Any
    label: Any


def test_tensors_are_named_by_their_path() -> None:
    image, label, other = torch.zeros(2), torch.ones(2), torch.ones(3)
    nested = {"image": image, 3: [label, "text", None], "pair": Pair(other, 5)}

    found = named_tensors(nested)

    assert list(found) == ["batch['image']", "batch[3][0]", "batch['pair'][0]"]
    assert found["batch['image']"] is image
    assert found["batch[3][0]"] is label
    assert found["batch['pair'][0]"] is other
    assert list(named_tensors((image, label))) == ["batch[0]", "batch[1]"]
    assert list(named_tensors(image)) == ["batch"]
    assert named_tensors("text") == {}
    assert named_tensors(torch.eye(3).to_sparse()) == {}  # it does not consist of samples
