"""Stages that were trained separately learn: in sequence they solve a task."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import StageConfig
from tests.helpers.nets import mlp
from tests.helpers.stages import TanhBlock, make_staged
from tests.helpers.threads import ThreadCollective, run_threads

SAMPLES, BATCH, EPOCHS = 48, 16, 80


def task() -> tuple[Tensor, Tensor]:
    """Four classes, by the signs of two features; a third feature, which is larger, is irrelevant."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    labels = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x * torch.tensor([1.0, 1.0, 4.0]), labels


def make_net() -> nn.Module:
    """A network with two numbers at the boundary; the first stage must learn which, and begins with the third."""
    torch.manual_seed(2)
    net = mlp(TanhBlock, width=2).double()
    with torch.no_grad():
        net.get_submodule("stem").weight.copy_(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.5]]))
    return net


def train(collective: ThreadCollective, net: nn.Module, config: StageConfig) -> dict[str, Tensor]:
    """The tensors of this worker's stage after the training."""
    x, labels = task()
    staged = make_staged(collective, net, config, x[:BATCH])
    optimizer = torch.optim.Adam(staged.net.parameters(), lr=0.05)
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(staged.worker(x[rows]), labels[rows]).backward()
            optimizer.step()
            staged.worker.end_step()
    return {name: tensor.detach() for name, tensor in staged.layout.stage_tensors(collective.worker).items()}


@pytest.mark.parametrize("method", ["penalty", "al-store"])
def test_stages_in_sequence_solve_what_they_learnt_apart(method: str) -> None:
    """Chance is 0.25.

    With a first stage that does not train, or trains in the wrong direction, or with stored guesses that belong
    to other samples, at most about half of the samples were right; with correct code 0.95 and all of them.
    """
    config = StageConfig(method=method, cuts=["body.1"], warmup_steps=0, multiplier_every=5)
    net, (x, labels) = make_net(), task()

    stages, _ = run_threads(train, 2, net, config)

    net.load_state_dict({**stages[0], **stages[1]})
    accuracy = (net(x).argmax(1) == labels).double().mean().item()
    assert accuracy > 0.8
