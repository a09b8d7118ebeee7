"""The settings of an IST run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from resist_lightning.methods.config import CommonConfig

LayerChoice: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True, kw_only=True)
class NeuronConfig(CommonConfig):
    """Settings of a run that partitions hidden neurons (IST).

    Args:
        layers: whose neurons are dealt out: None (those of all hidden layers), a glob or several over the names of
            layers, or a predicate of (name, module).

    The others are those of :class:`CommonConfig`.

    Raises:
        ValueError: if a value is outside its limits.
    """

    layers: LayerChoice = None
