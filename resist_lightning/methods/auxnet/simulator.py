"""Reference simulator of AuxNet: all stages in one process, without messages, to test the engine against.

Written as docs/decisions/0019 derives it: per sample and not for a batch mean, with multipliers κ in their own
units; the engine computes in units of the guess. With the engine it shares the cuts, the auxiliary networks, the
growth of β, and recalibration, and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.comm.collective import SoloCollective
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.network.aux_networks import make_aux_network
from resist_lightning.methods.auxnet.simulated_boundary import Boundary, NetworkBoundary, Pair, StoredBoundary
from resist_lightning.methods.auxnet.simulated_delay import LateGradients
from resist_lightning.methods.auxnet.step.equations import growth
from resist_lightning.methods.config import NormPolicy
from resist_lightning.state.batch_norm import BatchStatistics, Call, norms_with_statistics, recalibrate

LossOfOutput: TypeAlias = Callable[[Tensor], Tensor]


class StageSimulator:
    """Simulates K workers that each train a stage, at the same time.

    ::

        simulator = StageSimulator(model, lambda m: torch.optim.SGD(m.parameters(), 0.1), StageConfig(), 2, images[:8])
        for x, y in loader:
            simulator.step(x, lambda output: loss_function(output, y))
        evaluate(simulator.full_model())

    Random numbers that stages draw, as for dropout, differ from those in K processes.

    Args:
        module: the network, or a module that has it; it is copied, not changed.
        make_optimizers: builds the optimizer(s) of the copy.
        config: the settings, as for the engine.
        workers: number of simulated workers, at least 1.
        example: an input of the network, a batch.

    Attributes:
        module: the copy, all of whose stages train.
        optimizers: optimizers of the copy.
        boundaries: for each boundary, from the first, its source of guesses; none where nothing is guessed.
        steps: number of steps taken.

    Raises:
        StageSelectionError: if the network cannot be cut as asked.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizers: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
        config: StageConfig,
        workers: int,
        example: Tensor,
    ) -> None:
        self.config = config
        self.module = copy.deepcopy(module)
        made = make_optimizers(self.module)
        self.optimizers = [made] if isinstance(made, Optimizer) else list(made)
        self.steps = 0
        layout = StageLayout(self.module, config, workers)
        layout.prepare(example, SoloCollective())
        self._stages, self.boundaries = _divide(layout, config)
        self._attributes = layout.chain.attributes if layout.chain else None
        self._network = layout.chain.name if layout.chain else config.network or ""
        # One worker's stage is the whole network.
        self._stages = self._stages or [self.module.get_submodule(self._network)]
        self._late = LateGradients(self._stages, config.delay, config.warmup_steps) if config.delayed else None
        self._step_size = config.lambda_step or (0.1 if config.stored and workers > 2 else 1.0)
        self._inputs: deque[Tensor] = deque(maxlen=config.recalibration_batches)
        self._still: list[str] = []
        self._highest_rate = 0.0
        self._share = 1.0

    def step(self, x: Tensor, loss_of_output: LossOfOutput) -> Tensor:
        """Take a step of all stages and their auxiliary networks, in the present mode of :attr:`module`.

        Args:
            x: (batch, ...), the network's input.
            loss_of_output: gives the mean loss of the batch from the network's output.

        Returns:
            The loss.

        Raises:
            StageSelectionError: if a number or switch that the forward of the network reads has changed.
        """
        if self._attributes is not None:
            self._attributes.check()
        self._inputs.append(x)
        self._still = []
        for name, norm in norms_with_statistics(self.module).items():
            if not norm.training:
                self._still.append(name)
        share = self._rate_share()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss, wanted = self._compute(x, loss_of_output, share)
        for optimizer in self.optimizers:
            optimizer.step()
        for boundary, (guess, multiplier) in zip(self.boundaries, wanted, strict=True):
            boundary.learn(x, guess, multiplier, share)
        self.steps += 1
        return loss.detach()

    def full_model(self, batch_norm: NormPolicy | None = None) -> nn.Module:
        """A copy of the network, with batch-norm statistics by the policy.

        Args:
            batch_norm: another policy than that of the settings, to compare on one training.
        """
        batch_norm = batch_norm or self.config.batch_norm
        full = copy.deepcopy(self.module)
        full.zero_grad()
        if batch_norm == "batch":
            BatchStatistics(norms_with_statistics(full).values())
        elif batch_norm == "recalibrate" and len(self._stages) > 1 and self._inputs:
            network = full.get_submodule(self._network)
            calls: list[Call] = [(network, (x,), {}) for x in self._inputs]
            recalibrate(full, calls, torch.no_grad, self._still)
        return full

    def _compute(self, x: Tensor, loss_of_output: LossOfOutput, share: float) -> tuple[Tensor, list[Pair]]:
        if self._late is not None:
            return self._late.step(x, loss_of_output), []
        known = all(boundary.knows(x) for boundary in self.boundaries)
        if self.config.serial(self.steps) or not known:
            return self._serial(x, loss_of_output, share)
        return self._parallel(x, loss_of_output, share)

    def _parallel(self, x: Tensor, loss_of_output: LossOfOutput, share: float) -> tuple[Tensor, list[Pair]]:
        """The Jacobi schedule of section 2.4: everything from the values at the start of the step.

        In lists, index k belongs to boundary k; boundary 0 is the image, boundary K the network's output.
        """
        last, size = len(self._stages), len(x)
        lam, kappa = [x], [x]  # κ of boundary 0 is not used
        for boundary in self.boundaries:
            guess, multiplier = boundary.guess(x)
            lam.append(guess.detach().requires_grad_())
            kappa.append(multiplier.detach())
        made = [x, *(stage(lam[k]) for k, stage in enumerate(self._stages))]

        for k in range(1, last):
            # The loss of the stage that ends at boundary k, summed over the batch.
            beta = self._beta(share, lam[k])
            distance = (lam[k].detach() - made[k]).square().sum()
            summed = beta / 2 * distance - (kappa[k] * made[k]).sum()
            # The loss of a frozen first stage has nothing to train.
            if summed.requires_grad:
                (summed / size).backward()
        loss = loss_of_output(made[last])
        loss.backward()

        wanted = []
        update = self.config.multipliers and (self.steps + 1) % self.config.multiplier_every == 0
        for k in range(1, last):
            beta = self._beta(share, lam[k])
            violation = lam[k].detach() - made[k].detach()
            gradient = beta * violation + kappa[k] + size * _gradient(lam[k])
            next_lam = lam[k].detach() - self._step_size / beta * gradient
            next_kappa = kappa[k] + beta * violation if update else kappa[k]
            wanted.append((next_lam, next_kappa))
        return loss, wanted

    def _serial(self, x: Tensor, loss_of_output: LossOfOutput, share: float) -> tuple[Tensor, list[Pair]]:
        """Plain back-propagation; the boundaries learn values from which the next parallel step continues."""
        made = [x]
        for stage in self._stages[:-1]:
            # Also behind a frozen stage, whose output requires no gradient by itself.
            made.append(stage(made[-1]).requires_grad_())
            made[-1].retain_grad()
        loss = loss_of_output(self._stages[-1](made[-1]))
        loss.backward()

        wanted = []
        for truth in made[1:]:
            after = len(x) * _gradient(truth)
            lam, kappa = truth.detach(), torch.zeros_like(truth)
            if self.config.multipliers:
                kappa = -after  # a stationary point of the augmented Lagrangian
            elif self.config.stored:
                lam = lam - after / self._beta(share, truth)  # a stationary point of the penalty
            wanted.append((lam, kappa))
        return loss, wanted

    def _beta(self, share: float, boundary: Tensor) -> float:
        """β of the formulas: the setting's β weighs a mean over the boundary's elements."""
        beta = self.config.beta * growth(self.config.beta_growth, share)
        return beta / math.prod(boundary.shape[1:])

    def _rate_share(self) -> float:
        """The learning rate as a share of the highest so far."""
        rate = self.optimizers[0].param_groups[0]["lr"]
        self._highest_rate = max(self._highest_rate, rate)
        # A schedule that has ended at 0 leaves the share where it was.
        if rate > 0:
            self._share = rate / self._highest_rate
        return self._share


def _divide(layout: StageLayout, config: StageConfig) -> tuple[list[nn.Module], list[Boundary]]:
    """The stages, and boundaries where inputs are guessed; none with one worker."""
    if layout.chain is None:
        return [], []
    stages: list[nn.Module] = []
    for worker in range(layout.workers):
        first, last = layout.units(worker)
        stages.append(layout.chain.stage(first, last))
    boundaries: list[Boundary] = []
    if config.delayed:
        return stages, boundaries
    shapes = layout.boundary_shapes
    device = next(layout.module.parameters()).device
    for number, shape in enumerate(shapes.boundaries):
        if config.stored:
            boundaries.append(StoredBoundary())
            continue
        nonnegative = layout.nonnegative[number]
        network = make_aux_network(config, shapes.input, shape, nonnegative=nonnegative, boundary=number + 1)
        network.to(device, shapes.dtype)
        beta = config.beta / math.prod(shape)
        boundaries.append(NetworkBoundary(network, beta, config.aux_learning_rate))
    return stages, boundaries


def _gradient(tensor: Tensor) -> Tensor:
    """The tensor's gradient; zero where nothing flows back, as out of a stage that begins with a detached tensor."""
    return tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
