"""Builds auxiliary networks: from the network's input they guess a stage's, and its multiplier (section 2.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.aux_defaults import NetworkInput, default_body


class AuxNetwork(nn.Module):
    """An auxiliary network whose output is divided into guess and multiplier.

    Args:
        body: maps the network's input to (batch, *boundary_shape); if there are multipliers, the first dimension behind
            the batch is twice that long.
        multipliers: whether there are multipliers.
        nonnegative: whether the guess goes through a ReLU, as the guessed tensor does.
    """

    def __init__(self, body: nn.Module, *, multipliers: bool, nonnegative: bool) -> None:
        super().__init__()
        self.body = body
        self.multipliers = multipliers
        self.nonnegative = nonnegative

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The guess, and the multiplier in units of it."""
        guess: Tensor = self.body(x)
        multiplier = None
        if self.multipliers:
            guess, multiplier = guess.chunk(2, dim=1)
        if self.nonnegative:
            guess = functional.relu(guess)
        return guess, multiplier


def make_aux_network(
    config: StageConfig, given: NetworkInput, boundary_shape: Sequence[int], *, nonnegative: bool, boundary: int
) -> AuxNetwork:
    """The auxiliary network of a boundary, from the settings; random numbers from (seed, boundary) only.

    Args:
        config: the settings.
        given: the network's input.
        boundary_shape: shape of the stage's input, without the batch.
        nonnegative: whether that input is the output of a ReLU.
        boundary: number of the boundary, from 1.

    Raises:
        StageSelectionError: if the user's network gives another shape, or there is no default one for these shapes.
    """
    heads = 2 if config.multipliers else 1
    asked = (heads * boundary_shape[0], *boundary_shape[1:])
    # As in the simulator, whatever was drawn before; the user's generators are unchanged.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config.seed, boundary))
        if config.aux_network is None:
            body = default_body(given, boundary_shape, config.aux_width, heads)
        else:
            body = config.aux_network(given.shape, asked)
            _check_shape(body, given, asked)
    # A network of the user's has its own output activation.
    nonnegative = nonnegative and config.aux_network is None
    return AuxNetwork(body, multipliers=config.multipliers, nonnegative=nonnegative)


def _check_shape(body: nn.Module, given: NetworkInput, asked: tuple[int, ...]) -> None:
    # In eval mode, so that the statistics of batch norms stay as they are.
    training = body.training
    with torch.no_grad():
        # Its parameters still have the default data type; they take the network's later.
        dtype = torch.get_default_dtype() if given.dtype.is_floating_point else given.dtype
        made = body.eval()(torch.zeros(2, *given.shape, dtype=dtype))
    body.train(training)
    if tuple(made.shape) != (2, *asked):
        raise StageSelectionError(
            f"`aux_network` makes {tuple(made.shape[1:])} of {given.shape}, but the boundary needs {asked}. Its output "
            "must have the second argument's shape."
        )


def _seed(seed: int, boundary: int) -> int:
    digest = hashlib.sha256(f"auxiliary network {seed} {boundary}".encode()).digest()
    # torch takes seeds of 63 bits everywhere.
    return int.from_bytes(digest[:8], "big") % 2**63
