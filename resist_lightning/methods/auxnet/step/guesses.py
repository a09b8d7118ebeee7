"""Where a worker's guess of its input comes from, and what it learns from how wrong it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from resist_lightning.methods.auxnet.network.aux_networks import AuxNetwork
from resist_lightning.methods.auxnet.step.store import Samples, SampleStore

MOMENTUM = 0.9


class Guesses(ABC):
    """Guesses λ and multipliers u of one boundary, for the batch at hand."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """What it needs of memory, between two steps."""

    @abstractmethod
    def make(self, x: Samples) -> tuple[Tensor, Tensor | None]:
        """λ and u for a batch, without a graph."""

    @abstractmethod
    def learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, rate: float) -> None:
        """Move to what λ and u should be for a batch; after :meth:`make`, from what that gave.

        Args:
            x: the batch.
            guess: λ⁺.
            multiplier: u⁺; None without multipliers.
            rate: learning rate as a share of the highest.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that it has, on the CPU."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` gave."""


class NetworkGuesses(Guesses):
    """By an auxiliary network, which takes one step of SGD with momentum per batch.

    Args:
        network: the auxiliary network, on its device.
        learning_rate: the highest rate.
    """

    def __init__(self, network: AuxNetwork, learning_rate: float) -> None:
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), learning_rate, momentum=MOMENTUM)
        self._learning_rate = learning_rate
        self._made: tuple[Tensor, Tensor | None] | None = None

    @property
    @override
    def held_bytes(self) -> int:
        parameters = sum(3 * parameter.nbytes for parameter in self.network.parameters())  # gradient and momentum
        return parameters + sum(buffer.nbytes for buffer in self.network.buffers())

    @override
    def make(self, x: Samples) -> tuple[Tensor, Tensor | None]:
        self._made = guess, multiplier = self.network(x.images)
        return guess.detach(), multiplier.detach() if multiplier is not None else None

    @override
    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def learn(self, x: Samples, guess: Tensor, multiplier: Tensor | None, rate: float) -> None:
        (made, made_multiplier), self._made = self._made or self.network(x.images), None
        loss = functional.mse_loss(made, guess) / 2
        if made_multiplier is not None and multiplier is not None:
            loss = loss + functional.mse_loss(made_multiplier, multiplier) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate * rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        network = {name: tensor.cpu() for name, tensor in self.network.state_dict().items()}
        return {"network": network, "optimizer": self.optimizer.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class StoredGuesses(Guesses):
    """As they were last left, for each sample.

    Args:
        multipliers: whether there are multipliers.
    """

    def __init__(self, *, multipliers: bool) -> None:
        self.store = SampleStore(multipliers=multipliers)

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
