"""The augmented Lagrangian of a network that is cut into stages, written from its definition.

Of the package only the cut network is used, none of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


@dataclass
class Gradients:
    """Gradients of the assembled Lagrangian of a batch mean, by parameter name and for each boundary's guess."""

    parameters: dict[str, Tensor]
    guesses: list[Tensor]


def lagrangian(
    stages: Sequence[nn.Module],
    x: Tensor,
    loss: Loss,
    guesses: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    beta: float,
) -> Tensor:
    """L_β: the loss, and for each boundary β / 2 times the mean square per element and <κ, λ - Y>, batch means.

    Args:
        stages: the stages, from the first.
        x: a batch of inputs.
        loss: maps the network's output to a batch mean.
        guesses: λ of each boundary.
        multipliers: κ of each boundary.
        beta: β.
    """
    made = [stage(given) for stage, given in zip(stages, [x, *guesses], strict=True)]
    found = loss(made[-1])
    for guess, multiplier, truth in zip(guesses, multipliers, made[:-1], strict=True):
        for sample in range(len(x)):
            violation = guess[sample] - truth[sample]
            penalty = beta / 2 * (violation**2).mean()
            found = found + (penalty + (multiplier[sample] * violation).sum()) / len(x)
    return found


def gradients_of_lagrangian(
    net: nn.Module, stages: Sequence[nn.Module], x: Tensor, loss: Loss, guesses: Sequence[Tensor], *rest: Any
) -> Gradients:
    """Gradients of the whole Lagrangian at once, by autograd."""
    leaves = [guess.clone().requires_grad_() for guess in guesses]
    named = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(
        lagrangian(stages, x, loss, leaves, *rest), [*leaves, *named.values()], allow_unused=True
    )
    count = len(leaves)
    by_name = {name: g for name, g in zip(named, found[count:], strict=True) if g is not None}
    return Gradients(by_name, list(found[:count]))


def true_values(stages: Sequence[nn.Module], x: Tensor, loss: Loss) -> tuple[list[Tensor], list[Tensor]]:
    """Y and p of each boundary when the stages wait for each other: plain back-propagation; p is per sample."""
    made = [x]
    for stage in stages:
        made.append(stage(made[-1]))
    truths = made[1:-1]
    gradients = torch.autograd.grad(loss(made[-1]), truths)
    return [truth.detach() for truth in truths], [len(x) * gradient for gradient in gradients]
