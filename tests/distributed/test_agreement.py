"""Comparison of batches between real workers: those of seeded loaders agree, others are found to differ."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from resist_lightning.comm.torch_collective import GroupCollective
from resist_lightning.errors import WorkersDisagree
from resist_lightning.methods.auxnet.step.agreement import check_equal, named_tensors
from resist_lightning.strategies.data.seeded_loader import seed_loader
from tests.helpers.processes import run_workers

NOISE = v2.GaussianNoise()


def add_noise(samples: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    image, label = default_collate(samples)
    return [NOISE(image), label]


def agree(worker: int, seeded: bool) -> int:
    """Number of batches that all workers had alike, on a worker with random generators in a state of their own."""
    torch.manual_seed(worker)
    data = TensorDataset(torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6))
    loader = DataLoader(data, batch_size=4, collate_fn=add_noise)
    batches = seed_loader(loader, 0, lambda: 2) if seeded else loader
    assert isinstance(batches, DataLoader)
    collective = GroupCollective()
    return len([check_equal(collective, named_tensors(batch), f"step {step}") for step, batch in enumerate(batches)])


def test_seeded_loaders_give_all_workers_the_same_batches() -> None:
    assert run_workers(agree, 2, True) == [2, 2]


def test_other_batches_are_found() -> None:
    told = r"step 0: .* batch\[0\] differs in 4 of 4 samples \(0, 1, 2, 3\) between worker 0 and worker 1\."
    with pytest.raises(WorkersDisagree, match=told):
        run_workers(agree, 2, False)
