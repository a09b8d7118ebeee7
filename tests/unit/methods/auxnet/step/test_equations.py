"""The equations of a step, against the augmented Lagrangian that they minimize (checks 2 and 5 of section 8)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resist_lightning import StageConfig, StageSimulator
from resist_lightning.methods.auxnet.simulated_boundary import StoredBoundary
from resist_lightning.methods.auxnet.step.equations import Penalty, default_step, growth, mismatch, next_multiplier
from tests.helpers.lagrangian import gradients_of_lagrangian, true_values

CLASSES = 3


class Problem:
    """A random chain of tanh stages, a batch, and any guesses and multipliers."""

    def __init__(self, stages: int, width: int, size: int, seed: int, *, multipliers: bool) -> None:
        torch.manual_seed(seed)
        double: dict[str, Any] = {"dtype": torch.float64}
        first, last = nn.Linear(4, width, **double), nn.Linear(width, CLASSES, **double)
        middle = [nn.Sequential(nn.Linear(width, width, **double), nn.Tanh()) for _ in range(stages - 2)]
        self.stages = [nn.Sequential(first, nn.Tanh()), *middle, last]
        self.net = nn.Sequential(*self.stages)
        self.x, self.y = torch.randn(size, 4, **double), torch.randint(0, CLASSES, (size,))
        self.guesses = [torch.randn(size, width, **double) for _ in range(stages - 1)]
        self.kappas = [torch.randn(size, width, **double) * multipliers for _ in range(stages - 1)]

    def loss(self, output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, self.y)


@settings(max_examples=40)
@given(
    stages=st.integers(2, 4),
    width=st.integers(1, 5),
    size=st.integers(1, 4),
    beta=st.floats(0.1, 100),
    step=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
    multipliers=st.booleans(),
)
def test_the_equations_descend_the_lagrangian(
    stages: int, width: int, size: int, beta: float, step: float, seed: int, multipliers: bool
) -> None:
    problem = Problem(stages, width, size, seed, multipliers=multipliers)
    whole = gradients_of_lagrangian(
        problem.net, problem.stages, problem.x, problem.loss, problem.guesses, problem.kappas, beta
    )
    penalty = Penalty(beta, step)
    us = [kappa * width / beta for kappa in problem.kappas]

    given_ = [problem.x, *(guess.clone().requires_grad_() for guess in problem.guesses)]
    made = [stage(x) for stage, x in zip(problem.stages, given_, strict=True)]
    for k, output in enumerate(made[:-1]):
        target = problem.guesses[k] + us[k]
        output.backward(penalty.gradient(output.detach(), target) / size)
    problem.loss(made[-1]).backward()

    for name, parameter in problem.net.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.parameters[name], rtol=1e-6, atol=1e-9)
    for k, guess in enumerate(problem.guesses):
        after = penalty.in_units_of_guess(given_[k + 1].grad * size)
        moved = penalty.next_guess(guess, made[k].detach(), us[k] if multipliers else None, after)
        rate = step / (beta / width)  # c / β in the formulas
        torch.testing.assert_close(moved, guess - rate * size * whole.guesses[k], rtol=1e-6, atol=1e-9)


def test_the_multiplier_moves_by_beta_times_the_violation() -> None:
    guess, truth, kappa = (torch.tensor([[value]]) for value in (3.0, 2.5, 7.0))
    beta = 4.0
    assert (next_multiplier(guess, truth, kappa / beta) * beta).item() == 7.0 + 4.0 * 0.5


def test_the_mismatch_is_the_distance_as_a_share_of_the_truth() -> None:
    assert mismatch(torch.tensor([[3.0, 6.0]]), torch.tensor([[0.0, 10.0]])).item() == pytest.approx(0.5)
    assert mismatch(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


@pytest.mark.parametrize(("stages", "step"), [(1, 1.0), (2, 1.0), (3, 0.1), (9, 0.1)])
def test_the_closed_form_is_not_taken_for_stored_guesses_of_three_stages(stages: int, step: float) -> None:
    assert default_step(stages, stored=True) == step
    assert default_step(stages, stored=False) == 1


@pytest.mark.parametrize(
    ("share", "grown"),
    [(1.0, 1.0), (0.5, 1.0), (0.11, 1.0), (0.1, 3.0), (0.02, 3.0), (0.01, 9.0), (1e-3, 27.0), (0, 1)],
)
def test_beta_grows_once_for_each_factor_of_ten_of_the_rate(share: float, grown: float) -> None:
    assert growth(3.0, share) == pytest.approx(grown)


def test_a_rate_that_was_divided_by_ten_twice_counts_as_a_hundredth() -> None:
    rate = 0.3
    assert growth(2.0, rate / 10 / 10 / rate) == growth(2.0, rate * 0.1 * 0.1 / rate) == 4.0


# ------------------------------------------------------------------ free guesses, fixed weights


class Free(nn.Module):
    """A problem as a network that can be cut after each tanh."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        layers = [
            layer for stage in problem.stages for layer in (stage if isinstance(stage, nn.Sequential) else [stage])
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def settle(method: Any, stages: int, beta: float, steps: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Violations, κ and p of each boundary after many steps with fixed weights, from distant guesses."""
    problem = Problem(stages, 4, 5, seed=8, multipliers=False)
    cuts = [f"layers.{2 * stage + 1}" for stage in range(stages - 1)]
    config = StageConfig(method=method, beta=beta * 4, warmup_steps=0, cuts=cuts)
    standing = partial(torch.optim.SGD, lr=0.0)
    simulator = StageSimulator(Free(problem), lambda net: standing(net.parameters()), config, stages, problem.x)
    for boundary, guess in zip(simulator.boundaries, problem.guesses, strict=True):
        assert isinstance(boundary, StoredBoundary)
        boundary.learn(problem.x, guess, torch.zeros_like(guess), 1.0)
    for _ in range(steps):
        simulator.step(problem.x, problem.loss)
    pairs = [boundary.guess(problem.x) for boundary in simulator.boundaries]
    guesses = [guess for guess, _ in pairs]
    made = [stage(x) for stage, x in zip(problem.stages[:-1], [problem.x, *guesses], strict=False)]
    violations = [guess - truth for guess, truth in zip(guesses, made, strict=True)]
    _, after = true_values(problem.stages, problem.x, problem.loss)
    return violations, [kappa for _, kappa in pairs], after


@pytest.mark.parametrize(("stages", "steps"), [(2, 200), (3, 1000)])
def test_multipliers_drive_the_violation_to_0_and_become_the_true_gradients(stages: int, steps: int) -> None:
    violations, kappas, gradients = settle("al-store", stages, beta=10.0, steps=steps)
    for violation, kappa, gradient in zip(violations, kappas, gradients, strict=True):
        assert gradient.abs().max() > 1e-2
        assert violation.abs().max() < 1e-8
        torch.testing.assert_close(kappa, -gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stages", [2, 4])
def test_the_penalty_leaves_a_violation_of_the_gradient_over_beta(stages: int) -> None:
    beta = 200.0
    violations, kappas, gradients = settle("penalty-store", stages, beta, steps=300)
    for violation, kappa, gradient in zip(violations, kappas, gradients, strict=True):
        assert not kappa.any()
        torch.testing.assert_close(violation, -gradient / beta, rtol=0.05, atol=1e-5)
