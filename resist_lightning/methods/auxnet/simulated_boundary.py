"""Makes the guesses and multipliers of a boundary between two stages of the reference simulator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD
from typing_extensions import override

from resist_lightning.methods.auxnet.network.aux_networks import AuxNetwork

Pair: TypeAlias = tuple[Tensor, Tensor]
"""λ and κ of a batch at one boundary, (batch, *boundary) each; κ is 0 without multipliers."""


class Boundary(ABC):
    """Makes the guess λ and the multiplier κ of one boundary."""

    @abstractmethod
    def knows(self, x: Tensor) -> bool:
        """Whether there is a guess for every sample of a batch."""

    @abstractmethod
    def guess(self, x: Tensor) -> Pair:
        """λ and κ for a batch."""

    @abstractmethod
    def learn(self, x: Tensor, guess: Tensor, multiplier: Tensor, share: float) -> None:
        """Move to λ and κ for a batch; after :meth:`guess`, starting from its result.

        Args:
            x: the batch.
            guess: λ.
            multiplier: κ.
            share: learning rate as a share of the highest.
        """


class NetworkBoundary(Boundary):
    """An auxiliary network, trained by SGD with momentum 0.9, one step per batch.

    Args:
        network: gives λ and κ / β of a batch, with the initial β.
        beta: the initial β, per element.
        learning_rate: the highest rate.
    """

    def __init__(self, network: AuxNetwork, beta: float, learning_rate: float) -> None:
        self.network = network
        self._beta = beta
        self._learning_rate = learning_rate
        self._optimizer = SGD(network.parameters(), learning_rate, momentum=0.9)
        self._made: Pair | None = None

    @override
    def knows(self, x: Tensor) -> bool:
        return True

    @override
    def guess(self, x: Tensor) -> Pair:
        guess, multiplier = self.network(x)
        if multiplier is None:
            multiplier = torch.zeros_like(guess)
        # With their graph, which `learn` goes back through.
        self._made = guess, multiplier
        return guess, multiplier * self._beta

    @override
    def learn(self, x: Tensor, guess: Tensor, multiplier: Tensor, share: float) -> None:
        # After a serial step nothing was guessed yet.
        if self._made is None:
            self.guess(x)
        assert self._made is not None
        made, made_multiplier = self._made
        self._made = None
        loss = (made - guess).square().mean() / 2
        loss = loss + (made_multiplier - multiplier / self._beta).square().mean() / 2
        self._optimizer.param_groups[0]["lr"] = share * self._learning_rate
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


class StoredBoundary(Boundary):
    """The last λ and κ of each sample, which is identified by its values."""

    def __init__(self) -> None:
        self.table: dict[bytes, Pair] = {}

    @override
    def knows(self, x: Tensor) -> bool:
        return all(_name(sample) in self.table for sample in x)

    @override
    def guess(self, x: Tensor) -> Pair:
        pairs = [self.table[_name(sample)] for sample in x]
        guesses, multipliers = zip(*pairs, strict=True)
        return torch.stack(guesses), torch.stack(multipliers)

    @override
    def learn(self, x: Tensor, guess: Tensor, multiplier: Tensor, share: float) -> None:
        for sample, its_guess, its_multiplier in zip(x, guess, multiplier, strict=True):
            # Views would keep the whole batch.
            self.table[_name(sample)] = its_guess.clone(), its_multiplier.clone()


def _name(sample: Tensor) -> bytes:
    return sample.detach().cpu().contiguous().numpy().tobytes()
