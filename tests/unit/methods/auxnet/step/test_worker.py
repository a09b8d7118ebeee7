"""Workers that train stages, as threads: their gradients against the Lagrangian's (checks 2 to 4 of section 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resist_lightning import StageConfig
from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.step.guesses import NetworkGuesses, StoredGuesses
from resist_lightning.methods.auxnet.step.store import Samples
from tests.helpers.lagrangian import gradients_of_lagrangian, true_values
from tests.helpers.nets import mlp
from tests.helpers.stages import CLASSES, TanhBlock, load_guess, make_chain, make_staged, two_layers
from tests.helpers.threads import ThreadCollective, run_threads

CUTS = {2: ["body.1"], 3: ["body.0", "body.2"], 4: ["body.0", "body.1", "body.2"]}


@dataclass
class Problem:
    """A network, a batch, and any guesses and multipliers at its boundaries."""

    net: nn.Module
    config: StageConfig
    x: Tensor
    y: Tensor
    guesses: list[Tensor]
    kappas: list[Tensor]

    @property
    def workers(self) -> int:
        return len(self.guesses) + 1

    @property
    def beta_per_element(self) -> float:
        return self.config.beta / self.guesses[0].shape[1]

    def loss(self, output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, self.y)

    def stages(self) -> list[nn.Module]:
        return make_chain(self.net, self.config, self.workers)


def make_problem(workers: int, seed: int, *, width: int = 3, size: int = 4, **options: Any) -> Problem:
    torch.manual_seed(seed)
    net = mlp(TanhBlock, width=width).double()
    config = StageConfig(**{"cuts": CUTS[workers], "method": "penalty", "warmup_steps": 0, **options})
    x = torch.randn(size, 3, dtype=torch.float64)
    guesses = [torch.randn(size, width, dtype=torch.float64) for _ in range(workers - 1)]
    kappas = [torch.randn_like(guess) * config.multipliers for guess in guesses]
    return Problem(net, config, x, torch.randint(0, CLASSES, (size,)), guesses, kappas)


@dataclass
class Found:
    """A worker's results of one batch."""

    gradients: dict[str, Tensor]
    output: Tensor
    guess: Tensor | None = None
    multiplier: Tensor | None = None


def one_batch(collective: ThreadCollective, problem: Problem, steps: int) -> Found:
    """A forward, a backward and the end of the step, from the guesses of the problem."""
    staged = make_staged(collective, problem.net, problem.config, problem.x)
    worker, boundary = staged.worker, collective.worker - 1
    guess = multiplier = None
    if boundary >= 0:
        guess = problem.guesses[boundary]
        multiplier = problem.kappas[boundary] / problem.beta_per_element if problem.config.multipliers else None
    load_guess(worker, problem.x, guess, multiplier, steps)
    output = worker(problem.x)
    problem.loss(output).backward()
    worker.end_step()
    found = Found(staged.stage_gradients, output.detach())
    if isinstance(worker.guesses, StoredGuesses):
        found.guess, found.multiplier = worker.guesses.make(Samples(problem.x))
    return found


def assert_parallel_gradients(problem: Problem, steps: int) -> None:
    """Check that all workers' gradients are the Lagrangian's, and that every guess moved down its gradient."""
    config, beta = problem.config, problem.beta_per_element
    small = config.stored and problem.workers > 2
    stages, rate = problem.stages(), (0.1 if small else 1.0) / beta
    whole = gradients_of_lagrangian(
        problem.net, stages, problem.x, problem.loss, problem.guesses, problem.kappas, config.beta
    )

    found, _ = run_threads(one_batch, problem.workers, problem, steps)

    gradients = {name: gradient for worker in found for name, gradient in worker.gradients.items()}
    assert gradients.keys() == whole.parameters.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole.parameters[name], rtol=1e-6, atol=1e-9)
    for k, (guess, kappa) in enumerate(zip(problem.guesses, problem.kappas, strict=True)):
        worker = found[k + 1]
        moved = guess - rate * len(problem.x) * whole.guesses[k]
        torch.testing.assert_close(worker.guess, moved, rtol=1e-6, atol=1e-9)
        if config.multipliers:
            truth = stages[k]([problem.x, *problem.guesses][k]).detach()
            due = (steps + 1) % config.multiplier_every == 0
            assert worker.multiplier is not None
            torch.testing.assert_close(worker.multiplier * beta, kappa + due * beta * (guess - truth))


@settings(max_examples=8)
@given(
    workers=st.integers(2, 4),
    width=st.integers(1, 5),
    size=st.integers(1, 4),
    beta=st.floats(0.1, 50),
    steps=st.integers(0, 3),
    seed=st.integers(0, 1000),
    method=st.sampled_from(["penalty-store", "al-store"]),
)
def test_stages_have_the_gradients_of_the_assembled_lagrangian(
    workers: int, width: int, size: int, beta: float, steps: int, seed: int, method: Any
) -> None:
    problem = make_problem(workers, seed, width=width, size=size, beta=beta, method=method, multiplier_every=2)
    assert_parallel_gradients(problem, steps)


@pytest.mark.parametrize("method", ["penalty-store", "al-store"])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_at_every_number_of_stages_and_with_an_update_of_the_multipliers(workers: int, method: Any) -> None:
    problem = make_problem(workers, seed=workers, beta=3.0, method=method, multiplier_every=5)
    assert_parallel_gradients(problem, steps=4)


# ------------------------------------------------------------------ auxiliary networks


def by_network(collective: ThreadCollective, problem: Problem) -> dict[str, Any]:
    staged = make_staged(collective, problem.net, problem.config, problem.x)
    guesses = staged.worker.guesses
    before = None
    if isinstance(guesses, NetworkGuesses):
        before = [parameter.detach().clone() for parameter in guesses.network.parameters()]
    problem.loss(staged.worker(problem.x)).backward()
    staged.worker.end_step()
    if not isinstance(guesses, NetworkGuesses):
        return {}
    gradients = [p.grad for p in guesses.network.parameters()]
    return {"network": guesses.network, "before": before, "gradients": gradients}


@pytest.mark.parametrize("method", ["penalty", "al-net"])
@pytest.mark.parametrize("workers", [2, 3])
def test_auxiliary_networks_descend_the_lagrangian_end_to_end(workers: int, method: Any) -> None:
    """Their gradient is c / β times the Lagrangian's by their weights, through the guess (section 2.3)."""
    problem = make_problem(workers, seed=5, beta=7.0, method=method, aux_network=two_layers)
    found, _ = run_threads(by_network, workers, problem)
    for worker in found[1:]:
        for parameter, before in zip(worker["network"].parameters(), worker["before"], strict=True):
            parameter.data = before
            parameter.grad = None
    pairs = [worker["network"](problem.x) for worker in found[1:]]
    guesses = [guess for guess, _ in pairs]
    beta = problem.beta_per_element
    kappas = [torch.zeros_like(guess) if u is None else beta * u.detach() for guess, u in pairs]

    whole = gradients_of_lagrangian(
        problem.net,
        problem.stages(),
        problem.x,
        problem.loss,
        [g.detach() for g in guesses],
        kappas,
        problem.config.beta,
    )
    scale = 1 / problem.config.beta
    for guess, gradient, worker in zip(guesses, whole.guesses, found[1:], strict=True):
        guess.backward(gradient)
        for parameter, actual in zip(worker["network"].parameters(), worker["gradients"], strict=True):
            torch.testing.assert_close(actual, scale * parameter.grad, rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------ against plain back-propagation


def plain_gradients(problem: Problem) -> dict[str, Tensor]:
    named = dict(problem.net.named_parameters())
    found = torch.autograd.grad(problem.loss(problem.net(problem.x)), list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize(("workers", "boundary"), [(2, 0), (3, 1), (4, 0), (4, 1)])
def test_a_guess_that_is_off_by_the_gradient_over_beta_gives_the_back_propagated_one(
    workers: int, boundary: int
) -> None:
    """One boundary at a time: the stage before it gets its gradient of plain back-propagation (check 3)."""
    problem = make_problem(workers, seed=3, beta=6.0, method="penalty-store")
    truths, gradients = true_values(problem.stages(), problem.x, problem.loss)
    problem.guesses = list(truths)
    problem.guesses[boundary] = truths[boundary] - gradients[boundary] / problem.beta_per_element

    found, _ = run_threads(one_batch, workers, problem, 0)

    expected = plain_gradients(problem)
    for name, gradient in found[boundary].gradients.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_perfect_guess_starves_all_stages_but_the_last(workers: int) -> None:
    """Check 4: so a perfect auxiliary network is not the aim."""
    problem = make_problem(workers, seed=4, beta=6.0, method="penalty-store")
    problem.guesses, _ = true_values(problem.stages(), problem.x, problem.loss)

    found, _ = run_threads(one_batch, workers, problem, 0)

    expected = plain_gradients(problem)
    for worker in found[:-1]:
        assert worker.gradients
        assert all(gradient.abs().max() < 1e-14 for gradient in worker.gradients.values())
    for name, gradient in found[-1].gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_stationary_multiplier_gives_all_stages_the_back_propagated_gradient(workers: int) -> None:
    """λ = Y and κ = -p: at a stationary point of the augmented Lagrangian, parallel training loses nothing."""
    problem = make_problem(workers, seed=4, beta=6.0, method="al-store", multiplier_every=1)
    problem.guesses, gradients = true_values(problem.stages(), problem.x, problem.loss)
    problem.kappas = [-gradient for gradient in gradients]

    found, _ = run_threads(one_batch, workers, problem, 0)

    expected = plain_gradients(problem)
    for worker in found:
        for name, gradient in worker.gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    for worker, guess, kappa in zip(found[1:], problem.guesses, problem.kappas, strict=True):
        assert worker.guess is not None
        assert worker.multiplier is not None
        torch.testing.assert_close(worker.guess, guess)
        torch.testing.assert_close(worker.multiplier * problem.beta_per_element, kappa)


@pytest.mark.parametrize(("workers", "method"), [(2, "al-net"), (2, "penalty-store"), (4, "penalty"), (4, "al-store")])
def test_a_stage_in_a_first_step_has_the_plain_gradients_bit_for_bit(workers: int, method: Any) -> None:
    problem = make_problem(workers, seed=1, method=method, aux_network=two_layers)
    problem.config = StageConfig(cuts=CUTS[workers], warmup_steps=1, method=method, aux_network=two_layers)
    found, _ = run_threads(first_batch, workers, problem)
    expected = plain_gradients(problem)
    gradients = {name: gradient for worker in found for name, gradient in worker.items()}
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def first_batch(collective: ThreadCollective, problem: Problem) -> dict[str, Tensor]:
    staged = make_staged(collective, problem.net, problem.config, problem.x)
    problem.loss(staged.worker(problem.x)).backward()
    staged.worker.end_step()
    return staged.stage_gradients


@pytest.mark.parametrize("workers", [2, 4])
def test_every_worker_gets_the_output_of_the_last_stage(workers: int) -> None:
    problem = make_problem(workers, seed=2, method="penalty-store")
    found, _ = run_threads(one_batch, workers, problem, 0)
    expected = problem.stages()[-1](problem.guesses[-1]).detach()
    for worker in found:
        torch.testing.assert_close(worker.output, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ numbers that a trace has frozen


class Gate(nn.Module):
    """Adds a share of a layer; traced, as it is no residual block that is recognised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin, self.alpha = nn.Linear(width, width), 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.1, self.training)
        return x + self.alpha * torch.tanh(self.lin(x))


def with_a_schedule(collective: ThreadCollective, problem: Problem) -> str:
    """The error behind a good step and an evaluation, when a gate of the last stage opens."""
    staged = make_staged(collective, problem.net, problem.config, problem.x)
    for _ in range(2):
        problem.loss(staged.worker(problem.x)).backward()
        staged.worker.end_step()
        staged.net.eval()
        staged.net.train()
    gate: Any = staged.net.get_submodule("body.3")
    gate.alpha = 1.0
    with pytest.raises(StageSelectionError) as error:
        staged.worker(problem.x)
    return str(error.value)


@pytest.mark.parametrize("method", ["delayed", "penalty"])
def test_a_number_that_changes_in_the_training_is_told_on_all_workers(method: Any) -> None:
    """Its stage trained with the number from the start to the end, in silence."""
    problem = make_problem(2, seed=1)
    problem.net = mlp(Gate, width=3).double()
    problem.config = StageConfig(cuts=CUTS[2], method=method, warmup_steps=1)
    found, _ = run_threads(with_a_schedule, 2, problem)
    for error in found:
        assert "reads body.3.alpha, which was 0.0" in error
        assert "is 1.0 now" in error
