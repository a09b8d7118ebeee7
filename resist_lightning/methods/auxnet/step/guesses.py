"""A worker's guesses of its stage's input, from an auxiliary network or a store, and their updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.aux_networks import AuxNetwork, make_aux_network
from resist_lightning.methods.auxnet.step.equations import Penalty, growth, mismatch, next_multiplier
from resist_lightning.methods.auxnet.step.messages import Shapes
from resist_lightning.methods.auxnet.step.store import Samples, SampleStore

MOMENTUM = 0.9


class Guesses(ABC):
    """Guesses λ and multipliers u at one boundary.

    ``share`` is the learning rate of a batch as a share of the highest so far: beta grows as it falls. Multipliers are
    stored in units of the first beta, and used in units of the present one.
    """

    def __init__(self, config: StageConfig, stages: int, device: torch.device) -> None:
        self._config = config
        self._stages = stages
        # On the device, so that a step does not wait for the GPU.
        self._mismatch = torch.zeros((), device=device)
        self._batches = 0

    def guess(self, x: Samples, share: float) -> tuple[Tensor, Tensor | None]:
        """λ and u for a batch of images."""
        guess, multiplier = self.make(x)
        if multiplier is not None:
            multiplier = multiplier / self._growth(share)
        return guess, multiplier

    def correct(
        self,
        x: Samples,
        guess: tuple[Tensor, Tensor | None],
        truth: Tensor,
        gradient: Tensor,
        *,
        share: float,
        step: int,
    ) -> None:
        """Move the guess, and every ``multiplier_every`` steps the multiplier.

        Args:
            x: the images.
            guess: λ and u from :meth:`guess`.
            truth: Y.
            gradient: p of each sample.
            share: the learning rate as a share of the highest.
            step: number of the step, from 1.
        """
        given, multiplier = guess
        penalty = self._penalty(share)
        after = penalty.next_guess(given, truth, multiplier, penalty.in_units_of_guess(gradient))
        # Seldom, as the guess must settle first: with every step the two may diverge.
        if multiplier is not None and step % self._config.multiplier_every == 0:
            multiplier = next_multiplier(given, truth, multiplier)
        self._mismatch += mismatch(given, truth)
        self._batches += 1
        self._learn(x, after, multiplier, share)

    def begin_at(self, x: Samples, truth: Tensor, gradient: Tensor, share: float) -> None:
        """Learn from a serial step, in which the stage was given the truth.

        A multiplier begins at its stationary point, -r; a stored guess where it gives the stage before the true
        gradient; an auxiliary network learns the truth.
        """
        after = self._penalty(share).in_units_of_guess(gradient)
        guess = truth - after if self._config.method == "penalty-store" else truth
        multiplier = -after if self._config.multipliers else None
        self._learn(x, guess, multiplier, share)

    def take_mismatch(self) -> float:
        """Mean mismatch over the batches since the last call; 0 if there was none."""
        mean = float(self._mismatch) / self._batches if self._batches else 0.0
        self._mismatch.zero_()
        self._batches = 0
        return mean

    def _learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, share: float) -> None:
        # In units of the first beta: a store then needs no pass when beta grows.
        if multiplier is not None:
            multiplier = multiplier * self._growth(share)
        self.learn(x, guess, multiplier, share)

    def _penalty(self, share: float) -> Penalty:
        return Penalty.of(self._config, self._stages, share)

    def _growth(self, share: float) -> float:
        return growth(self._config.beta_growth, share)

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that are kept between two steps."""

    @abstractmethod
    def make(self, x: Samples) -> tuple[Tensor, Tensor | None]:
        """λ and u, in units of the first beta, for a batch; without a graph."""

    @abstractmethod
    def learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, rate: float) -> None:
        """Move to the λ and u that a batch should have; after :meth:`make`, starting from its result.

        Args:
            x: the batch.
            guess: λ⁺.
            multiplier: u⁺, in units of the first beta; None without multipliers.
            rate: learning rate as a share of the highest.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The whole state, on the CPU."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a :meth:`state_dict`."""


def make_guesses(
    config: StageConfig,
    shapes: Shapes,
    nonnegative: bool,
    *,
    collective: Collective,
    device: torch.device,
) -> Guesses | None:
    """A worker's source of guesses, by the settings; None without guesses, as on worker 0, which has the image."""
    boundary, stages = collective.worker, collective.workers
    if boundary == 0 or config.delayed:
        return None
    if config.stored:
        return StoredGuesses(config, stages, device)
    shape = shapes.boundaries[boundary - 1]
    network = make_aux_network(config, shapes.input, shape, nonnegative=nonnegative, boundary=boundary)
    return NetworkGuesses(network.to(device, shapes.dtype), config, stages, device)


class NetworkGuesses(Guesses):
    """Guesses of an auxiliary network, which takes one step of SGD with momentum per batch."""

    def __init__(self, network: AuxNetwork, config: StageConfig, stages: int, device: torch.device) -> None:
        super().__init__(config, stages, device)
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), config.aux_learning_rate, momentum=MOMENTUM)
        self._made: tuple[Tensor, Tensor | None] | None = None

    @property
    @override
    def held_bytes(self) -> int:
        # A parameter has a gradient and momentum beside it.
        parameters = sum(3 * parameter.nbytes for parameter in self.network.parameters())
        return parameters + sum(buffer.nbytes for buffer in self.network.buffers())

    @override
    def make(self, x: Samples) -> tuple[Tensor, Tensor | None]:
        # The graph is kept: `learn` goes back through it, or the next batch replaces it.
        self._made = guess, multiplier = self.network(x.images)
        if multiplier is not None:
            multiplier = multiplier.detach()
        return guess.detach(), multiplier

    @override
    def begin_at(self, x: Samples, truth: Tensor, gradient: Tensor, share: float) -> None:
        self._made = None  # of an earlier batch that had no backward pass
        super().begin_at(x, truth, gradient, share)

    # The last batch may be finished inside an evaluation, where no gradients are recorded.
    @override
    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, rate: float) -> None:
        # After a serial step nothing was guessed yet.
        made, made_multiplier = self._made or self.network(x.images)
        self._made = None
        loss = functional.mse_loss(made, guess) / 2
        if made_multiplier is not None and multiplier is not None:
            loss = loss + functional.mse_loss(made_multiplier, multiplier) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.aux_learning_rate * rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        # On the CPU, so that a checkpoint loads on any device.
        network = {}
        for name, tensor in self.network.state_dict().items():
            network[name] = tensor.cpu()
        return {"network": network, "optimizer": self.optimizer.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class StoredGuesses(Guesses):
    """The last guess and multiplier of each sample."""

    def __init__(self, config: StageConfig, stages: int, device: torch.device) -> None:
        super().__init__(config, stages, device)
        self.store = SampleStore(multipliers=config.multipliers)

    @property
    @override
    def held_bytes(self) -> int:
        return self.store.held_bytes

    @override
    def make(self, x: Samples) -> tuple[Tensor, Tensor | None]:
        return self.store.get(x.names, x.images.device)

    @override
    def learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, rate: float) -> None:
        self.store.put(x.names, guess, multiplier)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"store": self.store.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store.load_state_dict(state["store"])
