"""The reference simulator of AuxNet: its own gradients, untouched tensors, and its full model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import StageConfig, StageSelectionError, StageSimulator
from resist_lightning.state.batch_norm import norms_with_statistics
from tests.helpers.lagrangian import gradients_of_lagrangian
from tests.helpers.stages import (
    Run,
    batch_of,
    config_for,
    loss_of,
    make_chain,
    make_net,
    make_optimizer,
    plain_training,
    train_simulator,
)
from tests.helpers.training import clone_state

NORMS = Run(StageConfig(method="penalty", warmup_steps=1, aux_width=4, beta=3.0), 4, "preact")


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_is_one_down_the_gradient_of_the_lagrangian(workers: int, every: int) -> None:
    run = Run(StageConfig(method="al-store", warmup_steps=0, beta=4.0, multiplier_every=every), 1, "tanh")
    config, net = config_for(run, workers), make_net(run)
    x, y = batch_of(run, 0)
    standing = partial(torch.optim.SGD, lr=0.0)
    simulator = StageSimulator(net, lambda module: standing(module.parameters()), config, workers, x)
    generator = torch.Generator().manual_seed(workers)
    guesses, kappas = [[torch.randn(6, 6, generator=generator).double() for _ in range(workers - 1)] for _ in "λκ"]
    for boundary, guess, kappa in zip(simulator.boundaries, guesses, kappas, strict=True):
        boundary.learn(x, guess, kappa, 1.0)

    simulator.step(x, loss_of((x, y)))

    stages = make_chain(net, config, workers)
    whole = gradients_of_lagrangian(net, stages, x, loss_of((x, y)), guesses, kappas, 4.0)
    for name, parameter in simulator.module.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.parameters[name], rtol=1e-9, atol=1e-12)
    rate = (1.0 if workers == 2 else 0.1) / (4.0 / 6)  # c / β in the formulas, where β is per element
    for k, boundary in enumerate(simulator.boundaries):
        guess, kappa = boundary.guess(x)
        truth = stages[k]([x, *guesses][k]).detach()
        torch.testing.assert_close(guess, guesses[k] - rate * len(x) * whole.guesses[k])
        moved = kappas[k] + 4.0 / 6 * (guesses[k] - truth)
        torch.testing.assert_close(kappa, moved if every == 1 else kappas[k])


def test_warm_up_is_plain_training_bit_for_bit() -> None:
    run = Run(StageConfig(method="al-net", warmup_steps=4, aux_width=4, batch_norm="running"), 4, "preact")
    simulator, losses = train_simulator(run, 3)
    expected, expected_losses = plain_training(run)
    assert losses == expected_losses
    found = clone_state(simulator.full_model())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_given_module_is_not_changed() -> None:
    net = make_net(NORMS)
    before = clone_state(net)
    simulator = StageSimulator(net, partial(make_optimizer, NORMS), config_for(NORMS, 2), 2, batch_of(NORMS, 0)[0])
    for step in range(3):
        simulator.step(batch_of(NORMS, step)[0], loss_of(batch_of(NORMS, step)))
    assert all(torch.equal(value, before[name]) for name, value in clone_state(net).items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert simulator.steps == 3


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: norm.running_mean.clone() for name, norm in norms_with_statistics(module).items()}


def test_the_full_model_has_the_statistics_of_the_recorded_images() -> None:
    """And not those that stages gathered on guesses (section 2.5)."""
    simulator, _ = train_simulator(NORMS, 3)
    seen: list[Tensor] = []
    full = simulator.full_model()
    norm = full.get_submodule("section2.0.bn2")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    estimated = statistics(full)["section2.0.bn2"]
    for module in norms_with_statistics(full).values():
        module.momentum = 0.0
    for step in range(NORMS.steps):  # in training mode, so that earlier layers use batch statistics
        full(batch_of(NORMS, step)[0])
    expected = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(estimated, expected)
    gathered = statistics(simulator.full_model("running"))["section2.0.bn2"]
    assert not torch.allclose(gathered, expected, rtol=1e-3)
    assert torch.equal(gathered, statistics(simulator.module)["section2.0.bn2"])


def test_looking_at_the_full_model_changes_nothing() -> None:
    plain, losses = train_simulator(NORMS, 2)
    looked, _ = train_simulator(replace(NORMS, steps=2), 2)
    looked.full_model()
    looked.full_model("batch")
    for step in (2, 3):
        x, y = batch_of(NORMS, step)
        assert looked.step(x, loss_of((x, y))).item() == losses[step]
    expected = clone_state(plain.full_model())
    assert all(torch.equal(value, expected[name]) for name, value in clone_state(looked.full_model()).items())


def test_a_network_that_cannot_be_cut_so_often_is_refused() -> None:
    run = Run(StageConfig(), 1)
    with pytest.raises(StageSelectionError, match="9 workers need 8 cut"):
        StageSimulator(make_net(run), partial(make_optimizer, run), run.config, 9, batch_of(run, 0)[0])


class Scaled(nn.Sequential):
    """Scales its output by a number."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_a_number_that_changes_in_the_training_is_told() -> None:
    run = Run(StageConfig(), 1)
    net = Scaled(*make_net(run).children())
    simulator = StageSimulator(
        net, partial(make_optimizer, run), replace(run.config, cuts=["1.1"]), 2, batch_of(run, 0)[0]
    )
    batch = batch_of(run, 0)
    simulator.step(batch[0], loss_of(batch))
    simulator.module.scale = 0.5  # type: ignore[assignment]
    with pytest.raises(StageSelectionError, match=r"reads scale, which was 1\.0 .* is 0\.5 now"):
        simulator.step(batch[0], loss_of(batch))
